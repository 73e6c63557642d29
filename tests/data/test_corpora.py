import json
import time
from pathlib import Path

import numpy as np
import pytest

from moetrain.chat.records import read_messages
from moetrain.chat.registry import template_named
from moetrain.data.config import DataConfig, SourceConfig, SourceKind, TokenizerConfig, Unreadable
from moetrain.data.prepare.config import PrepareConfig
from moetrain.data.prepare.run import prepare
from moetrain.data.store.describe import PreparedPreview
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import DataError
from tests.data.test_prepare import TEXTS, content, prepared, write


def test_a_line_that_was_mended_in_another_length_moves_no_document_out_of_the_shards(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", TEXTS)
    lines = path.read_text().splitlines(keepends=True)
    last = len(lines) - 1
    path.write_text("".join([*lines[:last], '{"text": "broken\n']))
    with pytest.raises(DataError, match="is not JSON"):
        prepared(path, tmp_path / "resumed", tokenizer=tokenizer)
    longer = json.dumps({"text": f"longer {'than before ' * 9}"}) + "\n"
    path.write_text("".join([longer, *lines[1:]]))
    prepared(path, tmp_path / "resumed", tokenizer=tokenizer)
    prepared(path, tmp_path / "fresh", tokenizer=tokenizer)
    assert content(tmp_path / "resumed") == content(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("name", "body"),
    [("chatml", '{"name": "f", "arguments": ' + " " * 20000), ("deepseek_v3", " " * 20000)],
)
def test_a_call_of_spaces_is_read_in_no_time(name: str, body: str) -> None:
    started = time.monotonic()
    template_named(name).read_call("", body, index=0)
    read_messages([{"from": "human", "value": "a"}, {"from": "gpt", "value": f"x{body}y"}])
    assert time.monotonic() - started < 1


@pytest.mark.parametrize(
    "body",
    ['{"name": "f", "arguments": {"a": 1}, "id": "x"}', '{"name": "f", "arguments": "{\\"a\\": 1}"}'],
)
def test_the_arguments_of_a_call_of_hermes_are_an_object(body: str) -> None:
    call = template_named("chatml").read_call("", body, index=0)
    assert (call.name, call.arguments) == ("f", '{"a": 1}')


def test_text_around_results_stays() -> None:
    value = "3 rows\n<tool_response>\n1\n</tool_response>\nand a warning"
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    turns = [("human", "a"), ("gpt", call), ("tool", value), ("gpt", "b")]
    messages = read_messages([{"from": role, "value": text} for role, text in turns])
    assert messages[2].content == value


def test_what_a_template_cannot_render_is_dropped_where_asked(tokenizer: Tokenizer, tmp_path: Path) -> None:
    good = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    late = [good[0], {"role": "system", "content": "late"}, good[1]]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in (good, late)) + "broken\n")
    source = SourceConfig(kind=SourceKind.jsonl, path=str(path), format="messages", unreadable=Unreadable.drop)
    data = DataConfig(sources={"web": source}, seq_len=64)
    chatml = tokenizer.with_template(template_named("chatml"))
    counts = prepare(data, PrepareConfig(workers=1), folder=tmp_path / "out", tokenizer=chatml)["web"].counts
    assert (counts.num_read, counts.num_unreadable) == (1, 2)


def test_a_trained_tokenizer_has_the_named_template(tmp_path: Path) -> None:
    data = DataConfig(
        sources={"web": SourceConfig(kind=SourceKind.jsonl, path=str(write(tmp_path / "a.jsonl", TEXTS)))},
        seq_len=64,
        tokenizer=TokenizerConfig(vocab_size=300, template="chatml"),
    )
    prepare(data, PrepareConfig(workers=1), folder=tmp_path / "out")
    assert Tokenizer.load(tmp_path / "out" / "web" / "tokenizer").template.name == "chatml"


def test_chinese_text_of_an_evaluation_set_is_found(tokenizer: Tokenizer, tmp_path: Path) -> None:
    question = "小明有五个苹果他给了小红两个苹果请问小明现在还有多少个苹果"
    evaluation = write(tmp_path / "e.jsonl", [question])
    path = write(tmp_path / "a.jsonl", [f"网页{question}答案是三。", *TEXTS[:9]])
    sets = {"exam": SourceConfig(kind=SourceKind.jsonl, path=str(evaluation))}
    index = prepared(path, tmp_path / "out", tokenizer=tokenizer, decontaminate=sets)
    assert index.counts.num_contaminated == {"exam": 1}


def test_characters_are_those_of_the_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    index = prepared(write(tmp_path / "a.jsonl", TEXTS), tmp_path / "out", tokenizer=tokenizer)
    assert index.counts.num_characters == sum(map(len, TEXTS))


@pytest.mark.parametrize(("ends", "tokens"), [([0, 0], []), ([], [])])
def test_an_empty_token_file_of_another_program_is_no_traceback(
    ends: list[int], tokens: list[int], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "a.ds"
    np.array(tokens, "<u2").tofile(path)
    np.array(ends, "<u8").tofile(f"{path}.index")
    np.array([], "u1").tofile(f"{path}.loss")
    if not ends:
        with pytest.raises(DataError, match="has no documents"):
            prepared(path, tmp_path / "out", tokenizer=tokenizer, kind=SourceKind.datatrove)
        return
    prepared(path, tmp_path / "out", tokenizer=tokenizer, kind=SourceKind.datatrove)
    assert PreparedPreview(tmp_path / "out" / "web", tokenizer=tokenizer).size().lengths is None
