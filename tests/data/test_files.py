"""Reading of local data files: what is read, what is refused, and what is left out where asked."""

import dataclasses
import json
import random
from pathlib import Path

import pytest

from moetrain.data.config import SourceConfig, SourceKind, Unreadable
from moetrain.data.files import json_records, text_lines
from moetrain.data.sources import read_documents
from moetrain.errors import DataError


def folder_of(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    return path


def test_linked_folders_are_read_and_links_to_nothing_are_refused(tmp_path: Path) -> None:
    folder, other = folder_of(tmp_path / "data", "one"), folder_of(tmp_path / "elsewhere", "two")
    (folder / "part").symlink_to(other)
    (other / "back").symlink_to(folder)  # a circle
    config = SourceConfig(kind=SourceKind.jsonl, path=str(folder))
    assert {document.text for document in read_documents(config, name="s")} == {"one[EOS]", "two[EOS]"}
    (folder / "b.jsonl").symlink_to(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"data/b.jsonl is a link to a file that does not exist: remove the link"):
        read_documents(config, name="s")


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_a_line_of_text_that_is_not_utf8_is_named_or_left_out(tmp_path: Path, ends: str) -> None:
    path = tmp_path / "a.txt"
    lines = [
        b"first",
        b"bad \xff line",
        "third \u2028 \N{CJK UNIFIED IDEOGRAPH-4E2D}".encode(),
        b"x" * (1 << 20) + b"yz",
    ]
    path.write_bytes(ends.encode().join(lines))
    with pytest.raises(DataError, match=r"a.txt:2 is not UTF-8: invalid start byte"):
        list(text_lines(path))
    errors: list[str] = []
    assert "".join(text_lines(path, errors=errors)) == "\n".join(line.decode() for line in [lines[0], *lines[2:]])
    dropped: list[str] = []
    config = SourceConfig(kind=SourceKind.text, path=str(path), unreadable=Unreadable.drop)
    read_documents(config, name="s", unreadable=dropped)
    assert dropped == errors and len(errors) == 1


def test_a_long_line_that_turns_bad_does_not_run_into_the_next(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * (1 << 20) + b"\xff\nnext\n")
    errors: list[str] = []
    assert "".join(text_lines(path, errors=errors)) == "x" * (1 << 20) + "\nnext\n"
    assert len(errors) == 1


def test_a_text_file_is_read_as_python_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for seed in range(20):
        text = "".join(random.Random(seed).choices("ab\r\n\u2028\x85\x0c \N{CJK UNIFIED IDEOGRAPH-4E2D}", k=2000))
        path.write_bytes(text.encode())
        with path.open(encoding="utf-8") as file:
            assert list(text_lines(path)) == list(file)


def test_a_line_that_is_too_long_is_left_out_where_asked(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    records = [{"text": "one"}, {"text": "x" * 5000}, {"text": "two"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(DataError, match=r"a.jsonl:2 is longer than"):
        list(json_records(path, max_bytes=1000))
    errors: list[str] = []
    assert [record for _, record in json_records(path, max_bytes=1000, errors=errors)] == [records[0], records[2]]
    assert len(errors) == 1
    begin = path.read_text().index("two") - 5  # a range of bytes begins in the line before
    assert [record for _, record in json_records(path, begin=begin, max_bytes=1000, errors=errors)] == []
    path.write_text(json.dumps([{"text": "one"}, 3, {"text": "two"}]))
    with pytest.raises(DataError, match=r"a.jsonl record 2 holds int"):
        list(json_records(path))
    assert [record for _, record in json_records(path, errors=errors)] == [records[0], records[2]]
    assert errors[-1].endswith("record 2 holds int where an object is expected")


def test_a_conversation_is_not_dropped_for_one_that_learns_other_turns(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = tmp_path / "a.jsonl"
    messages = [[turns[0], {**turns[1], "weight": weight}] for weight in (0, 1, 0)]
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in messages))
    config = SourceConfig(kind=SourceKind.jsonl, path=str(path), format="messages")
    documents = read_documents(config, name="s")
    assert [any(piece.is_sampled for piece in document.pieces) for document in documents] == [False, True]


def test_keys_inside_content_parts_are_ignored_where_asked(tmp_path: Path) -> None:
    part = {"type": "text", "text": "q", "cache_control": {"type": "ephemeral"}}
    turns = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "a"}]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": turns}) + "\n")
    config = SourceConfig(kind=SourceKind.jsonl, path=str(path), format="messages")
    with pytest.raises(DataError, match=r"cache_control.*ignore=\[KEY\]"):
        read_documents(config, name="s")
    (document,) = read_documents(dataclasses.replace(config, ignore=["cache_control"]), name="s")
    assert "q" in document.text
