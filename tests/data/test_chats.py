"""Chats as people have them: files of records in, documents or a refusal that names file and line out."""

import copy
import re
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from moetrain.data.build import build_data
from moetrain.data.config import MIN_VOCAB_SIZE, DataConfig, SourceConfig, SourceKind, TokenizerConfig, Unreadable
from moetrain.data.formats import Document
from moetrain.data.sources import read_documents
from moetrain.errors import DataError

USER = {"role": "user", "content": "Q"}


def read(path, **options) -> list[Document]:
    kind = SourceKind.parquet if str(path).endswith("parquet") else SourceKind.jsonl
    config = SourceConfig(kind=kind, path=str(path), format="messages", **options)
    return read_documents(config, name="chat")


def learned(document: Document) -> str:
    return "".join(piece.text for piece in document.pieces if piece.is_sampled)


def calling(name: str, arguments: object, identity: str) -> list[dict[str, object]]:
    call = {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}
    result = {"role": "tool", "tool_call_id": identity, "content": "R"}
    return [{"role": "assistant", "content": None, "tool_calls": [call]}, result]


def declared(name: str, *keys: str) -> dict[str, object]:
    parameters = {"type": "object", "properties": {key: {"type": "string"} for key in keys}}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}


def test_ids_of_any_form_become_those_of_the_template(write_jsonl) -> None:
    turns = [*calling("get", '{"city": "Oslo"}', "call_a1"), *calling("send", "{}", "call_d4")]
    (document,) = read(write_jsonl("a.jsonl", [{"messages": [USER, *turns, {"role": "assistant", "content": "A"}]}]))
    assert "<|tool_call_begin|>functions.get:0<|" in document.text and "Return of functions.get:0\n" in document.text
    assert "<|tool_call_begin|>functions.send:1<|" in document.text and "Return of functions.send:1\n" in document.text
    assert "call_" not in document.text.replace("tool_call_", "")


def test_a_turn_with_weight_0_is_read_and_not_learned(write_jsonl) -> None:
    off = {"role": "assistant", "content": "bad", "weight": 0}
    on = {"role": "assistant", "content": "4", "weight": 1}
    (document,) = read(write_jsonl("a.jsonl", [{"messages": [USER, off, USER, on]}]))
    assert "bad" in document.text
    assert learned(document) == "<think></think>4<|im_end|>"


def test_conversations_without_a_learned_turn_are_dropped_and_counted(write_jsonl, tmp_path) -> None:
    def chat(number: int, **rest: object) -> dict[str, object]:
        return {"messages": [USER, {"role": "assistant", "content": f"answer {number}", **rest}]}

    records = [chat(number, train=number % 2 == 0) for number in range(40)]
    source = SourceConfig(kind=SourceKind.jsonl, path=str(write_jsonl("a.jsonl", records)), format="messages")
    tokenizer = TokenizerConfig(vocab_size=MIN_VOCAB_SIZE)
    config = DataConfig(seq_len=64, sources={"chat": source}, tokenizer=tokenizer, validation_rows=1)
    counts = build_data(config, 0, tokenizer_folder=tmp_path / "tokenizer").counts["chat"]
    assert counts.num_documents > 30
    assert 10 < counts.num_dropped_untrainable <= 20
    assert counts.num_pieces == counts.num_documents - counts.num_dropped_untrainable


def test_records_that_cannot_be_read_are_dropped_and_counted_when_asked(write_jsonl, tmp_path, caplog) -> None:
    good = [{"messages": [USER, {"role": "assistant", "content": f"answer {number}"}]} for number in range(4)]
    bad = [{"messages": [{"role": "robot", "content": "x"}]}, {"messages": [USER, {"role": "assistant"}]}]
    path = write_jsonl("a.jsonl", [*good, *bad])
    config = DataConfig(
        seq_len=64,
        sources={
            "chat": SourceConfig(kind=SourceKind.jsonl, path=str(path), format="messages", unreadable=Unreadable.drop)
        },
        tokenizer=TokenizerConfig(vocab_size=MIN_VOCAB_SIZE),
        validation_rows=1,
    )
    data = build_data(config, 0, tokenizer_folder=tmp_path / "tokenizer")
    assert data.metrics()["data/chat/num_dropped_unreadable"] == 2
    assert data.counts["chat"].num_documents in (3, 4)  # one may be held out
    assert f"data.sources.chat: 2 unreadable records dropped; the first is {path}:5: message 0: the role" in caplog.text
    config.sources["chat"].unreadable = Unreadable.refuse
    with pytest.raises(DataError, match=r"a.jsonl:5: message 0: the role is 'robot'"):
        build_data(config, 0, tokenizer_folder=tmp_path / "tokenizer")


def test_chats_begin_as_rollouts_do_and_text_begins_with_bos(write_jsonl, tmp_path) -> None:
    chats = [{"messages": [USER, {"role": "assistant", "content": f"answer {number}"}]} for number in range(4)]
    sources = {
        "chat": SourceConfig(kind=SourceKind.jsonl, path=str(write_jsonl("a.jsonl", chats)), format="messages"),
        "text": SourceConfig(kind=SourceKind.jsonl, path=str(write_jsonl("b.jsonl", [{"text": "a"}, {"text": "b"}]))),
    }
    tokenizer = TokenizerConfig(vocab_size=MIN_VOCAB_SIZE)
    data = build_data(DataConfig(seq_len=64, sources=sources, tokenizer=tokenizer), 0, tokenizer_folder=tmp_path / "t")
    first = {name: {int(tokens[0]) for tokens, _ in rows.documents()} for name, rows in data.training.items()}
    special = data.tokenizer.special_ids
    assert first == {"chat": {special["<|im_user|>"]}, "text": {special["[BOS]"]}}


def test_arguments_that_are_no_json_are_named_by_file_and_line(write_jsonl) -> None:
    chat = {"messages": [USER, {"role": "assistant", "content": "A"}]}
    path = write_jsonl("a.jsonl", [chat, {"messages": [USER, *calling("f", "{'city': Oslo", "x")]}])
    with pytest.raises(DataError, match=re.escape(f"{path}:2: message 1: function.arguments of f holds str")):
        read(path)


def test_an_unknown_key_is_refused_unless_it_is_ignored(write_jsonl) -> None:
    messages = [USER, {"role": "assistant", "content": "A", "score": 1}]
    path = write_jsonl("a.jsonl", [{"messages": messages, "source": "web"}])
    with pytest.raises(DataError, match=re.escape(f"{path}:1: the record has the unknown key 'source'; known are")):
        read(path)
    with pytest.raises(DataError, match=r"the message has the unknown key 'score'.*data.sources.NAME.ignore=\[KEY\]"):
        read(path, ignore=["source"])
    (document,) = read(path, ignore=["source", "score"])
    assert learned(document) == "<think></think>A<|im_end|>"


def test_ignored_keys_are_left_out_of_calls_and_declarations_but_not_of_arguments(write_jsonl) -> None:
    schema = {"type": "object", "properties": {"index": {"type": "integer"}}}
    chat = [USER, *calling("f", '{"index": 1}', "x")]
    plain = {"messages": chat, "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]}
    extended: Any = copy.deepcopy(plain)
    extended["messages"][1]["tool_calls"][0]["index"] = 0
    extended["tools"][0]["function"]["index"] = 5
    with pytest.raises(DataError, match=r"unknown key 'index'.*removes a key from records, messages, calls and"):
        read(write_jsonl("a.jsonl", [extended]))
    assert read(write_jsonl("a.jsonl", [extended]), ignore=["index"]) == read(write_jsonl("b.jsonl", [plain]))


def test_tools_that_are_nested_too_deeply_are_refused(write_jsonl) -> None:
    record = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "tools": "[" * 50_000,
    }
    with pytest.raises(DataError, match=r"tools holds text that is not JSON: it is nested too deeply"):
        read(write_jsonl("a.jsonl", [record]))


def test_parquet_gives_what_jsonl_gives(write_jsonl, tmp_path) -> None:
    """One schema for all rows gives each call, and each declaration, the keys of all others as null."""
    end = {"role": "assistant", "content": "A"}
    records = [
        {"messages": [USER, *calling("get", {"city": "Rome"}, "a"), end], "tools": [declared("get", "city")]},
        {
            "messages": [USER, *calling("send", {"to": "Ann", "x": {"y": 1}}, "b"), end],
            "tools": [declared("send", "to")],
        },
        {"messages": [USER, end], "tools": None},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == read(write_jsonl("a.jsonl", records))
