import gzip
import json
import logging
import re
from pathlib import Path

import pytest

from moetrain.chat.pieces import EOS, Piece
from moetrain.chat.templates.kimi_k2 import IM_END
from moetrain.data.config import SourceConfig, SourceKind
from moetrain.data.formats import format_named, register_format
from moetrain.data.sources import digest_of, read_documents
from moetrain.errors import ConfigError, DataError


def jsonl(path, **options) -> SourceConfig:
    return SourceConfig(kind=SourceKind.jsonl, path=str(path), **options)


def test_jsonl_records_become_documents_that_end_with_eos(write_jsonl) -> None:
    path = write_jsonl("a.jsonl", [{"text": "one"}, {"text": "two"}])
    documents = read_documents(jsonl(path), name="mine")
    assert [document.text for document in documents] == [f"one{EOS}", f"two{EOS}"]


def test_a_broken_jsonl_line_is_named_by_file_and_line(write_jsonl) -> None:
    path = write_jsonl("a.jsonl", [{"text": "one"}])
    with path.open("a") as file:
        file.write('\n{"text": "two"\n')
    with pytest.raises(DataError, match=re.escape(f"{path}:3 is not JSON")):
        read_documents(jsonl(path), name="mine")


def test_bytes_that_are_not_utf8_are_named_by_file_and_line(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=re.escape(f"{path}:2 is not UTF-8")):
        read_documents(jsonl(path), name="mine")


def test_a_line_that_is_no_object_is_refused(write_jsonl) -> None:
    path = write_jsonl("a.jsonl", [{"text": "one"}, ["two"]])
    with pytest.raises(DataError, match=re.escape(f"{path}:2 holds list where an object")):
        read_documents(jsonl(path), name="mine")


def test_an_array_in_a_file_is_read_as_its_objects(tmp_path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "one"}, {"text": "two"}], indent=1))
    assert [document.text for document in read_documents(jsonl(path), name="mine")] == [f"one{EOS}", f"two{EOS}"]
    path.write_text('[{"text": "one"}, 2]')
    with pytest.raises(DataError, match=re.escape(f"{path} record 2 holds int where an object")):
        read_documents(jsonl(path), name="mine")
    path.write_text('{\n "text": "one"\n}')
    with pytest.raises(
        DataError, match=re.escape(f"{path}:1 is not JSON") + ".*give one object per line, or one array"
    ):
        read_documents(jsonl(path), name="mine")


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path) -> None:
    lines, text = tmp_path / "a.jsonl", tmp_path / "a.txt"
    lines.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n')
    text.write_bytes(b"\xef\xbb\xbfHello\r\nworld\r\n")
    (document,) = read_documents(jsonl(lines), name="mine")
    assert document.text == f"one{EOS}"
    (document,) = read_documents(SourceConfig(kind=SourceKind.text, path=str(text)), name="mine")
    assert document.text == f"Hello\nworld\n{EOS}"


def test_a_file_packed_with_gzip_is_read_and_a_torn_one_is_named(tmp_path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n'))
    for given in (path, tmp_path):
        assert [document.text for document in read_documents(jsonl(given), name="mine")] == [f"one{EOS}"]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=re.escape(f"{path} cannot be read")):
        read_documents(jsonl(path), name="mine")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\x28\xb5\x2f\xfd....", "cannot be read"),
        ("text".encode("utf-16"), "is UTF-16: convert it to UTF-8"),
    ],
)
def test_a_file_that_is_packed_or_written_otherwise_is_named_with_the_cure(tmp_path, data: bytes, said: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(DataError, match=re.escape(f"{path} {said}")):
        read_documents(SourceConfig(kind=SourceKind.text, path=str(path)), name="mine")


def test_a_path_that_exists_is_no_pattern(write_jsonl) -> None:
    write_jsonl("notes1.jsonl", [{"text": "other"}])
    path = write_jsonl("notes[1].jsonl", [{"text": "mine"}])
    assert [document.text for document in read_documents(jsonl(path), name="mine")] == [f"mine{EOS}"]
    path.unlink()
    assert [document.text for document in read_documents(jsonl(path), name="mine")] == [f"other{EOS}"]


def test_empty_documents_are_dropped_and_counted(write_jsonl, caplog: pytest.LogCaptureFixture) -> None:
    path = write_jsonl("a.jsonl", [{"text": "one"}, {"text": ""}, {"text": " \n"}])
    with caplog.at_level(logging.INFO):
        assert [document.text for document in read_documents(jsonl(path), name="mine")] == [f"one{EOS}"]
    assert "data.sources.mine: 2 empty documents dropped" in caplog.text


def test_a_wrong_column_is_answered_with_those_there_are(write_jsonl) -> None:
    path = write_jsonl("a.jsonl", [{"body": "one", "title": "x"}])
    with pytest.raises(DataError, match="has no column text: it has body, title"):
        read_documents(jsonl(path), name="mine")


def test_a_column_that_holds_no_text_is_refused(write_jsonl) -> None:
    path = write_jsonl("a.jsonl", [{"text": 5}])
    with pytest.raises(DataError, match=re.escape(f"{path}:1: column text holds int")):
        read_documents(jsonl(path), name="mine")


@pytest.mark.parametrize("kind", [SourceKind.jsonl, SourceKind.text, SourceKind.parquet])
def test_a_missing_file_is_named(kind: SourceKind) -> None:
    with pytest.raises(DataError, match=r"/nowhere/x\* does not exist"):
        read_documents(SourceConfig(kind=kind, path="/nowhere/x*"), name="mine")


def test_an_empty_source_is_refused(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"data.sources.mine has no documents"):
        read_documents(jsonl(tmp_path), name="mine")


def test_a_folder_without_fitting_files_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match=r"holds no file that ends in \.jsonl"):
        read_documents(jsonl(tmp_path), name="mine")


def test_identical_documents_are_read_once(write_jsonl) -> None:
    path = write_jsonl("a.jsonl", [{"text": "one"}, {"text": "two"}, {"text": "one"}])
    assert len(read_documents(jsonl(path), name="mine")) == 2


def test_a_long_text_file_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path) -> None:
    text = "".join(f"{number} " + "word " * 300 + "\n\n" for number in range(20))
    (tmp_path / "a.txt").write_text(text)
    documents = read_documents(SourceConfig(kind=SourceKind.text, path=str(tmp_path / "*.txt")), name="mine")
    assert "".join(document.pieces[0].text for document in documents) == text
    assert len(documents) > 2
    assert all(len(document.pieces[0].text) >= 4000 for document in documents[:-1])


def test_parquet_is_read_and_a_broken_file_is_named(tmp_path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), path)
    config = SourceConfig(kind=SourceKind.parquet, path=str(path))
    assert [document.pieces[0].text for document in read_documents(config, name="mine")] == ["one", "two"]
    named = path.rename(tmp_path / "a[1].parquet")
    of_name = SourceConfig(kind=SourceKind.parquet, path=str(named))
    assert [document.pieces[0].text for document in read_documents(of_name, name="mine")] == ["one", "two"]
    named.rename(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=re.escape(f"{path} cannot be read")):
        read_documents(config, name="mine")


def test_the_limit_of_characters_keeps_whole_documents(write_jsonl) -> None:
    path = write_jsonl("a.jsonl", [{"text": f"{number:04d}" * 10} for number in range(50)])
    documents = read_documents(jsonl(path, max_characters=500), name="mine")
    assert 0 < sum(len(document.text) for document in documents) <= 500
    assert {len(document.pieces[0].text) for document in documents} == {40}
    assert documents == read_documents(jsonl(path, max_characters=500), name="mine")


def test_messages_are_rendered_by_the_template_and_only_assistants_are_learned(write_jsonl) -> None:
    call = {"id": "functions.get:0", "type": "function", "function": {"name": "get", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "", "reasoning_content": "R", "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "functions.get:0", "name": "get"},
        {"role": "assistant", "content": "A"},
    ]
    path = write_jsonl("chat.jsonl", [{"messages": messages}])
    (document,) = read_documents(jsonl(path, format="messages"), name="chat")
    learned = "".join(piece.text for piece in document.pieces if piece.is_sampled)
    assert learned.startswith("<think>R</think><|tool_calls_section_begin|><|tool_call_begin|>functions.get:0")
    assert learned.endswith(f"<think></think>A{IM_END}")
    assert "42" in document.text and "42" not in learned
    assert "Q" in document.text and "Q" not in learned


def test_arguments_of_a_call_do_not_gain_the_keys_of_other_calls(write_jsonl) -> None:
    def record(arguments: dict[str, int]) -> dict[str, object]:
        calls = [{"function": {"name": "f", "arguments": arguments}}]
        return {"messages": [{"role": "assistant", "content": "", "tool_calls": calls}]}

    path = write_jsonl("chat.jsonl", [record({"a": 1}), record({"b": 2})])
    first, second = read_documents(jsonl(path, format="messages"), name="chat")
    assert '{"a": 1}' in first.text and '{"b": 2}' in second.text


def test_an_unknown_role_and_a_conversation_without_assistant_are_refused(write_jsonl) -> None:
    path = write_jsonl("chat.jsonl", [{"messages": [{"role": "robot", "content": "x"}]}])
    with pytest.raises(DataError, match=re.escape(f"{path}:1: message 0: the role is 'robot'")):
        read_documents(jsonl(path, format="messages"), name="chat")
    path = write_jsonl("chat.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    with pytest.raises(DataError, match="has nothing to learn: give at least one"):
        read_documents(jsonl(path, format="messages"), name="chat")


def test_a_plugin_registers_a_format_once(write_jsonl) -> None:
    def question_and_answer(record, column):
        return [Piece(text=record["q"]), Piece(text=record[column], is_sampled=True)]

    register_format("test_question_and_answer", question_and_answer)
    path = write_jsonl("a.jsonl", [{"q": "why", "a": "so"}])
    (document,) = read_documents(jsonl(path, field="a", format="test_question_and_answer"), name="mine")
    assert document.text == "whyso"
    with pytest.raises(ConfigError, match="is registered already"):
        register_format("test_question_and_answer", question_and_answer)
    with pytest.raises(ConfigError, match=r"format is nope: give one of messages, .*text"):
        format_named("nope")


def test_the_digest_depends_on_texts_and_their_order(write_jsonl) -> None:
    one = read_documents(jsonl(write_jsonl("a.jsonl", [{"text": "ab"}, {"text": "c"}])), name="mine")
    two = read_documents(jsonl(write_jsonl("b.jsonl", [{"text": "a"}, {"text": "bc"}])), name="mine")
    assert digest_of(one) == digest_of(list(one))
    assert len({digest_of(one), digest_of(two), digest_of(one[::-1])}) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ' + "[" * 200_000, r"mine\.jsonl:1 cannot be read: RecursionError"),
        ('{"text": ' + "1" * 5000 + "}", r"mine\.jsonl:1 cannot be read: ValueError: Exceeds the limit"),
        ('{"text": "a", "text": "b"}', r"mine\.jsonl:1 has the key 'text' twice in one object: remove one of them"),
        (r'{"text": "a\ud800b"}', r"mine\.jsonl:1 holds U\+D800, half of a surrogate pair"),
    ],
)
def test_json_that_python_cannot_hold_is_named_by_line(line: str, message: str, tmp_path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        read_documents(jsonl(path), name="mine")


def test_a_device_is_no_file_and_a_source_without_text_names_its_file(tmp_path) -> None:
    with pytest.raises(DataError, match=r"/dev/null is no regular file: give a file, a glob or a folder"):
        read_documents(jsonl(Path("/dev/null")), name="mine")
    path = tmp_path / "empty.jsonl"
    path.write_text("\n")
    with pytest.raises(DataError, match=r"data\.sources\.mine has no documents in .*empty\.jsonl: give a source"):
        read_documents(jsonl(path), name="mine")


ASSISTANT = {"role": "assistant", "content": "hello"}


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "user", "content": 5}, r"content holds int '5': give text, or a list of parts of type text"),
        ({"role": "user", "content": [{"type": "image_url"}]}, r"content holds list .*: give text, or a list of parts"),
        ({"role": "user", "name": 3, "content": "x"}, r"name holds int '3': give text"),
        ({"role": ["user"], "content": "x"}, r"the role is \['user'\]: give one of"),
        ({**ASSISTANT, "tool_calls": 5}, r"tool_calls holds int '5': give a list of calls"),
        (
            {**ASSISTANT, "tool_calls": [{"id": 7, "function": {"name": "f", "arguments": {}}}]},
            r"id holds int '7': give text",
        ),
        (
            {**ASSISTANT, "tool_calls": [{"function": {"name": "f:7"}}]},
            r"function\.name is str 'f:7': give a name without a colon or space",
        ),
        ({**ASSISTANT, "tool_calls": [{"function": {"name": 1}}]}, r"function\.name is int '1': give a name without"),
        (
            {**ASSISTANT, "tool_calls": [{"function": {"name": "f", "arguments": 5}}]},
            r"function\.arguments of f holds int '5': give an object",
        ),
    ],
)
def test_a_message_of_another_form_is_named_by_file_and_line(message, said: str, write_jsonl) -> None:
    path = write_jsonl("mine.jsonl", [{"messages": [ASSISTANT]}, {"messages": [message, ASSISTANT]}])
    config = SourceConfig(kind=SourceKind.jsonl, path=str(path), format="messages")
    with pytest.raises(DataError, match=rf"mine\.jsonl:2: message 0: {said}"):
        read_documents(config, name="mine")


def test_parts_of_type_text_are_read_as_their_text(write_jsonl) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    users = [{"role": "user", "content": content} for content in ("hello", parts)]
    files = [write_jsonl(f"{number}.jsonl", [{"messages": [user, ASSISTANT]}]) for number, user in enumerate(users)]
    configs = [SourceConfig(kind=SourceKind.jsonl, path=str(f), format="messages") for f in files]
    plain, in_parts = (read_documents(config, name="mine") for config in configs)
    assert plain == in_parts
