"""`moetrain data` on chats as people have them: what is rendered, what is learned, what is refused."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from moetrain.cli.main import main
from moetrain.data.config import MIN_VOCAB_SIZE
from moetrain.data.tokenizer import train_tokenizer

TOY = ["data", "model=k2_nano_test", "data=none", "data.sources.mine.format=messages"]
USER = {"role": "user", "content": "Rome?"}
ANSWER = {"role": "assistant", "content": "21 C"}


def calling(identity: str | None, arguments: object = '{"city": "Rome"}', **result: object) -> list[dict[str, object]]:
    call = {"type": "function", "function": {"name": "get", "arguments": arguments}}
    call |= {"id": identity} if identity else {}
    return [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "21", **result},
    ]


def show(tmp_path: Path, records: list[object], *words: str) -> int:
    """Write the records and run the command on them in this process."""
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    folder = f"run.folder={tmp_path / 'runs'}"
    code = main([*TOY, "data.sources.mine.kind=jsonl", f"data.sources.mine.path={path}", folder, *words])
    assert not (tmp_path / "runs").exists()
    return code


@pytest.mark.parametrize(
    ("messages", "shown"),
    [
        (
            [USER, *calling("call_a1B2", tool_call_id="call_a1B2"), ANSWER],
            "⟦<think></think><|tool_calls_section_begin|><|tool_call_begin|>functions.get:0<|tool_call_argument_begin|>"
            '{"city": "Rome"}<|tool_call_end|><|tool_calls_section_end|><|im_end|>⟧<|im_system|>tool<|im_middle|>'
            "## Return of functions.get:0\n21<|im_end|>",
        ),
        ([USER, *calling(None, name="get"), ANSWER], "<|im_system|>get<|im_middle|>## Return of functions.get:0\n21<"),
        (
            [USER, {**ANSWER, "content": "bad", "weight": 0}, USER, ANSWER],
            "<think></think>bad<|im_end|><|im_user|>user<|im_middle|>Rome?<|im_end|>"
            "<|im_assistant|>assistant<|im_middle|>⟦<think></think>21 C<|im_end|>⟧\n",
        ),
        ([USER, {**ANSWER, "content": "a\x1b[31m⟧"}], r"⟦<think></think>a\x1b[31m⟧<|im_end|>⟧"),
    ],
)
def test_a_record_is_shown_as_it_is_learned(
    messages: list[object], shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show(tmp_path, [{"messages": messages}]) == 0
    page = capsys.readouterr().out
    assert page.startswith("--- mine, record 0\n<|im_user|>user<|im_middle|>Rome?")
    assert shown in page
    assert "Tokens are not counted: give data.tokenizer.path" in page


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (calling("x", "{'city': Rome", tool_call_id="x")[0], "function.arguments of get holds str"),
        ({**ANSWER, "contnet": "x"}, "the message has the unknown key 'contnet'; did you mean content?"),
        ({"role": "assistant", "content": None}, "an assistant message is empty"),
    ],
)
def test_a_record_that_cannot_be_read_is_one_line(
    message: object, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show(tmp_path, [{"messages": [USER, ANSWER]}, {"messages": [USER, message, ANSWER]}]) == 2
    output = capsys.readouterr()
    assert f"mine.jsonl:2: message 1: {said}" in output.err
    assert not output.out


def test_parquet_shows_no_key_of_another_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [
        {"messages": [USER, *calling("x", arguments, tool_call_id="x"), ANSWER]}
        for arguments in ({"city": "Rome"}, {"to": "Ann"})
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "mine.parquet")
    words = ["data.sources.mine.kind=parquet", f"data.sources.mine.path={tmp_path / 'mine.parquet'}", "records=2"]
    assert main([*TOY, *words, f"run.folder={tmp_path}"]) == 0
    page = capsys.readouterr().out
    assert '{"city": "Rome"}' in page and '{"to": "Ann"}' in page and "null" not in page


def test_documents_characters_and_tokens_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_tokenizer([], vocab_size=MIN_VOCAB_SIZE).save(tmp_path / "tokenizer")
    records = [{"messages": [USER, {"role": "assistant", "content": "x" * 100 + str(number)}]} for number in range(10)]
    words = [f"data.tokenizer.path={tmp_path / 'tokenizer'}", "characters=20"]
    unreadable = {"messages": [USER, {"role": "robot", "content": "x"}]}
    words.append("data.sources.mine.unreadable=drop")
    assert show(tmp_path, [*records, *records[:2], unreadable], *words) == 0
    page = capsys.readouterr().out
    text = len("user" + "Rome?" + "assistant" + "x" * 101)
    row = page.splitlines()[-1].split()
    assert row[:6] == ["mine", "10", "2", "1", f"{10 * text:,}", f"{10 * (text + 8):,}"]
    length = f"{text + 8:,}"
    assert row[6] == f"{text / (text + 8):.2f}" and row[8:] == [length] * 3
    assert "more characters" in page and "estimated" not in page
