"""`moetrain prepare`: the same bytes for any number of processes and stops; what is dropped is counted."""

import gzip
import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from moetrain.data.build import build_data
from moetrain.data.config import DataConfig, SourceConfig, SourceKind, TokenizerConfig, Unreadable
from moetrain.data.files import json_records
from moetrain.data.formats import text_document
from moetrain.data.maths import maths_problems
from moetrain.data.prepare.config import PrepareConfig
from moetrain.data.prepare.inputs import shards_of, unit_documents, units_of
from moetrain.data.prepare.run import prepare
from moetrain.data.sources import read_documents, text_documents
from moetrain.data.store.describe import PreparedPreview
from moetrain.data.store.index import Index, Part, read_index
from moetrain.data.tokenize import tokenize
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import ConfigError, DataError

TEXTS = [f"{number} {text}" for number, text in enumerate(maths_problems(seed=1, num_documents=120))]
KIND = SourceKind.jsonl


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def prepared(
    path: Path, folder: Path, *, tokenizer: Tokenizer, kind: SourceKind = KIND, fraction: float = 0.1, **options
) -> Index:
    data = DataConfig(
        sources={"web": SourceConfig(kind=kind, path=str(path))}, seq_len=64, validation_fraction=fraction
    )
    config = PrepareConfig(**{"workers": 1, "shard_bytes": 3000, **options})
    return prepare(data, config, folder=folder, tokenizer=tokenizer)["web"]


def content(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_any_number_of_workers_writes_the_same_bytes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", TEXTS)
    one = prepared(path, tmp_path / "one", tokenizer=tokenizer, workers=1)
    two = prepared(path, tmp_path / "two", tokenizer=tokenizer, workers=2)
    assert one == two and len(one.files) > 3
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert not [name for name in content(tmp_path / "one") if "/." in name]


@pytest.mark.parametrize("name", ["tokens-00000.bin", ".work/00000-documents.npy", ".work/00000-keys.npy"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:40])])
def test_a_finished_shard_that_was_damaged_is_written_again(
    name: str, damage: Callable[[Path], object], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", TEXTS)
    prepared(path, tmp_path / "whole", tokenizer=tokenizer)
    good = path.read_bytes()
    path.write_bytes(good[:-3] + b"???")
    with pytest.raises(DataError, match="is not JSON"):
        prepared(path, tmp_path / "stopped", tokenizer=tokenizer)
    path.write_bytes(good)
    os.utime(path, (0, 0))
    damage(tmp_path / "stopped" / "web" / name)
    prepared(path, tmp_path / "stopped", tokenizer=tokenizer)
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")


@pytest.mark.parametrize("read", [True, False])
def test_text_in_parquet_that_is_not_utf8_is_named_or_dropped(read: bool, tokenizer: Tokenizer, tmp_path: Path) -> None:
    bad = pyarrow.StringArray.from_buffers(
        2, pyarrow.py_buffer(np.array([0, 4, 8], "i4").tobytes()), pyarrow.py_buffer(b"caf\xe9good")
    )
    table = pyarrow.table({"text": pyarrow.concat_arrays([pyarrow.array(TEXTS[:30]), bad])})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    source = SourceConfig(kind=SourceKind.parquet, path=str(tmp_path / "a.parquet"))

    def counted(source: SourceConfig) -> int:
        if read:
            return len(read_documents(source, name="web"))
        data = DataConfig(sources={"web": source}, seq_len=64)
        config = PrepareConfig(workers=1, near_duplicates=False)
        return prepare(data, config, folder=tmp_path / "prepared", tokenizer=tokenizer)["web"].counts.num_read

    with pytest.raises(DataError, match=r"a\.parquet row 30 has text that is not UTF-8"):
        counted(source)
    assert counted(replace(source, unreadable=Unreadable.drop)) == 31


def test_a_stopped_preparation_resumes_to_the_same_bytes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", TEXTS)
    prepared(path, tmp_path / "whole", tokenizer=tokenizer)
    good = path.read_bytes()
    path.write_bytes(good[:-3] + b"???")  # the last line is broken, so the last shard fails
    with pytest.raises(DataError, match=rf"data.sources.web: .*a.jsonl:{len(TEXTS)} is not JSON"):
        prepared(path, tmp_path / "stopped", tokenizer=tokenizer)
    folder = tmp_path / "stopped" / "web"
    done = {name: value.stat().st_mtime_ns for name in ("tokens-00000.bin",) if (value := folder / name).exists()}
    (folder / ".tokens-00007.bin.123.tmp").write_bytes(b"left by a killed process")
    path.write_bytes(good)
    os.utime(path, (0, 0))
    prepared(path, tmp_path / "stopped", tokenizer=tokenizer)
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")
    assert done == {name: (folder / name).stat().st_mtime_ns for name in done} != {}


def test_a_file_that_was_modified_meanwhile_is_read_again(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.jsonl", [*TEXTS, "last"])
    good = path.read_bytes()
    path.write_bytes(good[:-3] + b"???")
    with pytest.raises(DataError, match="is not JSON"):
        prepared(path, tmp_path / "stopped", tokenizer=tokenizer)
    path.write_bytes(good.replace(TEXTS[0][:9].encode(), b"X" * 9))  # the first shard is done, and the size is the same
    prepared(path, tmp_path / "stopped", tokenizer=tokenizer)
    prepared(path, tmp_path / "whole", tokenizer=tokenizer)
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")
    assert "was modified after that" not in caplog.text
    later = (tmp_path / "whole" / "web" / "index.json").stat().st_mtime + 1
    os.utime(path, (later, later))
    prepared(path, tmp_path / "whole", tokenizer=tokenizer)
    assert f"{path} was modified after that: if its content is another one, give another run.name" in caplog.text


def test_a_finished_folder_is_kept_and_one_of_other_input_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", TEXTS)
    first = prepared(path, tmp_path / "out", tokenizer=tokenizer)
    before = content(tmp_path / "out")
    assert prepared(path, tmp_path / "out", tokenizer=tokenizer) == first
    with pytest.raises(DataError, match=r"out/web was prepared with another validation_fraction: give"):
        prepared(path, tmp_path / "out", tokenizer=tokenizer, fraction=0.2)
    write(path, TEXTS[1:])
    with pytest.raises(DataError, match=r"out/web was prepared with another content of .*a.jsonl"):
        prepared(path, tmp_path / "out", tokenizer=tokenizer)
    both = tmp_path / "both"
    both.mkdir()
    first_file = write(both / "a.jsonl", TEXTS[:50])
    prepared(both, tmp_path / "two", tokenizer=tokenizer)
    write(both / "b.jsonl", TEXTS[50:])
    with pytest.raises(DataError, match=r"two/web was prepared with other files, without .*both/b.jsonl: give"):
        prepared(both, tmp_path / "two", tokenizer=tokenizer)
    assert first_file.is_file() and content(tmp_path / "out") == before


def test_a_tokenizer_is_trained_on_the_same_texts_in_one_file_and_in_many(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "many").mkdir()
    for number in range(300):
        write(tmp_path / "many" / f"{number:03}.jsonl", [f"document {number} has words of its own, {number**3}"])
    write(tmp_path / "one.jsonl", [f"document {number} has words of its own, {number**3}" for number in range(300)])
    for name in ("many", "one.jsonl"):
        source = {"web": SourceConfig(kind=KIND, path=str(tmp_path / name))}
        data = DataConfig(sources=source, seq_len=64, tokenizer=TokenizerConfig(vocab_size=300))
        prepare(data, PrepareConfig(workers=1), folder=tmp_path / f"of_{name}", tokenizer=None)
    trained = [record.message for record in caplog.records if record.message.startswith("tokenizer of 300")]
    assert len(trained) == 2 and all(abs(int(said.split()[-2]) - 12_000) < 1_500 for said in trained), trained


def test_a_folder_that_is_no_prepared_source_is_refused_with_the_cure(tokenizer: Tokenizer, tmp_path: Path) -> None:
    prepared(write(tmp_path / "a.jsonl", TEXTS), tmp_path / "out", tokenizer=tokenizer)
    for folder, message in [
        ("out", rf"out has no index.json: give the folder of one source, such as {tmp_path}/out/web"),
        ("nowhere", r"nowhere does not exist: give the folder of a source"),
        (".", r"has no index.json: prepare the data again"),
    ]:
        with pytest.raises(DataError, match=message):
            read_index(tmp_path / folder)
    with pytest.raises(ConfigError, match=r"prepare.shard_bytes is 1: give at least 1000"):
        PrepareConfig(shard_bytes=1)


@pytest.mark.parametrize("shard_bytes", [1, 700, 5000, 10**6])
def test_every_line_is_read_by_one_unit(shard_bytes: int, tmp_path: Path) -> None:
    texts = [*TEXTS[:20], "x" * 3000, "y", *TEXTS[20:30]]
    path = write(tmp_path / "a.jsonl", texts)
    config = SourceConfig(kind=KIND, path=str(path))
    units = units_of(config, shard_bytes=shard_bytes)
    found = [document.key for unit in units for document in unit_documents(config, unit, errors=[])]
    assert found == texts
    assert [unit for shard in shards_of(units, shard_bytes=shard_bytes) for unit in shard] == units


def test_an_array_is_one_unit_whatever_stands_before_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n" * 9000 + " [" + ",\n".join(json.dumps({"text": text}) for text in TEXTS) + "]")
    config = SourceConfig(kind=KIND, path=str(path))
    units = units_of(config, shard_bytes=1000)
    found = [document.key for unit in units for document in unit_documents(config, unit, errors=[])]
    assert found == TEXTS and len(units) == 1


def test_the_line_of_a_range_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", TEXTS)
    offset = len(path.read_bytes()) // 2
    (place, record), *_ = json_records(path, begin=offset)
    line = int(str(place).rpartition(":")[2])
    assert record["text"] == TEXTS[line - 1] and line > 10
    with pytest.raises(DataError, match=r"a.jsonl:1 is longer than 0 MiB"):
        next(json_records(path, max_bytes=20))


def test_compressed_and_parquet_and_text_files_give_the_same_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    plain = write(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    half = plain.read_bytes()
    frames = [pyarrow.compress(part, "zstd", asbytes=True) for part in (half[:500], half[500:])]
    frames.insert(0, b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd")  # a frame to skip, as pzstd writes
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    table = pyarrow.table({"text": TEXTS, "other": list(range(len(TEXTS)))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    kinds = {"a.jsonl": KIND, "a.jsonl.gz": KIND, "a.jsonl.zst": KIND, "a.parquet": SourceKind.parquet}
    digests = set()
    for name, kind in kinds.items():
        index = prepared(tmp_path / name, tmp_path / f"{name}.out", tokenizer=tokenizer, kind=kind)
        tokens = [(tmp_path / f"{name}.out" / "web" / file.name).read_bytes() for file in index.files]
        digests.add(b"".join(tokens))
        assert len(index.files) > 1 or name.endswith((".gz", ".zst"))
    assert len(digests) == 1
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames[:2])[:-9])
    with pytest.raises(DataError, match=r"a.jsonl.zst"):
        prepared(tmp_path / "a.jsonl.zst", tmp_path / "bad", tokenizer=tokenizer)


def test_a_long_document_is_tokenized_in_parts_and_a_text_without_blank_lines_is_cut(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    text = "some words\n" * 500 + "x" * 2500
    ((tokens, mask),) = tokenize([text_document(text)], tokenizer, max_characters=1000)
    assert tokenizer.decode(tokens[1:-1].tolist()) == text
    assert (tokens[0], tokens[-1]) == (tokenizer.bos_id, tokenizer.eos_id) and mask.sum() == len(mask) - 1
    (tmp_path / "a.txt").write_text(text)
    pieces = [document.key for document in text_documents(tmp_path / "a.txt", max_characters=2000)]
    assert "".join(pieces) == text and [len(piece) // 2000 for piece in pieces] == [1, 1, 1]


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\n\n  ", "\n \n\n"])
def test_texts_are_cut_after_blank_lines(end: str, tmp_path: Path) -> None:
    parts = ["a" * 3999 + "\n\n", "b\n \n", "c" * 5000 + "\n\t\n\n", "d\ne" + end]
    (tmp_path / "a.txt").write_bytes("".join(parts).replace("\n", "\r\n").encode())
    found = [document.key for document in text_documents(tmp_path / "a.txt")]
    assert found == [parts[0], parts[1] + parts[2], parts[3]]


def test_identical_and_similar_documents_are_dropped_and_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    base = " ".join(f"word{number}" for number in range(80))
    similar = base.replace("word79", "changed")
    texts = [base, *TEXTS[:40], similar, "", *TEXTS[:3], base, *TEXTS[40:60]]
    path = write(tmp_path / "a.jsonl", texts)
    exact = prepared(path, tmp_path / "exact", tokenizer=tokenizer).counts
    assert (exact.num_read, exact.num_empty, exact.num_identical) == (len(texts), 1, 4)
    assert exact.num_training + exact.num_held_out == 62
    near = prepared(path, tmp_path / "near", tokenizer=tokenizer, near_duplicates=True).counts
    parts = np.fromfile(tmp_path / "near" / "web" / "split.bin", dtype=np.uint8)
    assert near.num_similar >= 1 and parts[0] != Part.left_out and parts[41] == Part.left_out
    assert (parts == Part.left_out).sum() == near.num_left_out
    assert near.num_training + near.num_held_out == 62 - near.num_similar
    shown = PreparedPreview(tmp_path / "near" / "web", tokenizer=tokenizer).size()
    assert (shown.num_duplicates, shown.num_dropped) == (4 + near.num_similar, 1)
    assert shown.num_documents + shown.num_duplicates + shown.num_dropped == len(texts)


def test_texts_of_few_words_are_near_duplicates_only_if_they_are_equal(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["!!!", "???", "\U0001f642", "-- ++", "a+b", "a-b", "A B", *TEXTS[:9]])
    counts = prepared(path, tmp_path / "out", tokenizer=tokenizer, near_duplicates=True).counts
    assert (counts.num_similar, counts.num_identical, counts.num_training + counts.num_held_out) == (0, 0, 16)


def test_files_of_a_folder_that_are_not_read_are_counted(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "in"
    (folder / ".cache").mkdir(parents=True)
    write(folder / "a.jsonl", TEXTS)
    write(folder / ".cache" / "b.jsonl", ["hidden"])
    for name in ("c.jsonl.xz", "d.ndjson", "e.ndjson"):
        (folder / name).write_bytes(b"")
    counts = prepared(folder, tmp_path / "out", tokenizer=tokenizer).counts
    assert counts.num_read == len(TEXTS)
    assert f"{folder} has files that are not read: 2 x .ndjson, 1 x .xz" in caplog.text


def test_documents_that_contain_an_evaluation_set_are_dropped_and_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    question = "How many apples has Ann if she buys seven apples and then eats three of them?"
    sets = {
        "apples": SourceConfig(kind=KIND, path=str(write(tmp_path / "test.jsonl", [question, "too short"]))),
        "other": SourceConfig(kind=KIND, path=str(write(tmp_path / "other.jsonl", [" ".join(map(str, range(20)))]))),
    }
    copies = [f"before, HOW many apples has Ann if she buys seven: apples and then eats. {n}" for n in range(3)]
    path = write(tmp_path / "a.jsonl", [*TEXTS[:30], *copies, "How many apples has Ann if she buys seven pears?"])
    counts = prepared(path, tmp_path / "out", tokenizer=tokenizer, decontaminate=sets).counts
    assert counts.num_contaminated == {"apples": 3, "other": 0}
    assert counts.num_training + counts.num_held_out == 31
    twelve = " ".join(TEXTS[0].split()[:3] + [f"w{number}" for number in range(9)])
    shorter = SourceConfig(
        kind=KIND, path=str(write(tmp_path / "twelve.jsonl", [twelve, " ".join(map(str, range(13)))]))
    )
    path = write(tmp_path / "b.jsonl", [*TEXTS[:30], f"one two {twelve}"])  # 12 words and an end are no 13 words
    counts = prepared(path, tmp_path / "twelve", tokenizer=tokenizer, decontaminate={"shorter": shorter}).counts
    assert counts.num_contaminated == {"shorter": 0}
    for kind in (SourceKind.dialogues, SourceKind.prepared, SourceKind.megatron):
        path_or_none = None if kind is SourceKind.dialogues else str(path)
        with pytest.raises(ConfigError, match=f"prepare.decontaminate.q.kind is {kind}, which has no text to look for"):
            PrepareConfig(decontaminate={"q": SourceConfig(kind=kind, path=path_or_none)})
    with pytest.raises(DataError, match=r"prepare.decontaminate.apples has no record of 40 words"):
        prepared(path, tmp_path / "no", tokenizer=tokenizer, decontaminate=sets, ngram=40)


def test_unreadable_records_are_dropped_and_counted_where_asked(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.jsonl", TEXTS[:20])
    with path.open("a") as file:
        file.write('{"text": 3}\n')
    data = DataConfig(sources={"web": SourceConfig(kind=KIND, path=str(path), unreadable=Unreadable.drop)}, seq_len=64)
    index = prepare(data, PrepareConfig(workers=1), folder=tmp_path / "out", tokenizer=tokenizer)["web"]
    assert (index.counts.num_read, index.counts.num_unreadable) == (20, 1)
    assert f"data.sources.web: 1 unreadable records dropped; the first is {path}:21: column text holds" in caplog.text
    folder = tmp_path / "out" / "web"
    stored = DataConfig(
        sources={"web": SourceConfig(kind=SourceKind.prepared, path=str(folder))},
        seq_len=64,
        tokenizer=TokenizerConfig(path=str(folder / "tokenizer")),
    )
    assert build_data(stored, 0, tokenizer_folder=tmp_path / "stage").counts["web"].num_dropped_unreadable == 1
    other = replace(stored, validation_fraction=0.3)
    with pytest.raises(ConfigError, match=r"validation_fraction is 0.3, and data.sources.web was prepared with 0.02:"):
        build_data(other, 0, tokenizer_folder=tmp_path / "stage")
    with pytest.raises(DataError, match=r"a.jsonl:21: column text holds int '3'"):
        prepared(path, tmp_path / "strict", tokenizer=tokenizer)


def test_a_tokenizer_is_trained_on_the_sources_where_none_is_given(tmp_path: Path) -> None:
    source = SourceConfig(kind=KIND, path=str(write(tmp_path / "a.jsonl", TEXTS)))
    data = DataConfig(sources={"web": source}, seq_len=64, tokenizer=TokenizerConfig(vocab_size=320))
    (index,) = prepare(data, PrepareConfig(workers=1), folder=tmp_path / "out").values()
    assert index.tokenizer == Tokenizer.load(tmp_path / "out" / "web" / "tokenizer").digest
    with pytest.raises(ConfigError, match=r"data.tokenizer.path is null: give the folder"):
        prepare(DataConfig(sources={"web": source}), PrepareConfig(workers=1), folder=tmp_path / "two")
    with pytest.raises(ConfigError, match=r"vocab_size is 330, and .* has a tokenizer of 320 tokens: give another"):
        other = DataConfig(sources={"web": source}, seq_len=64, tokenizer=TokenizerConfig(vocab_size=330))
        prepare(other, PrepareConfig(workers=1), folder=tmp_path / "out")
    with pytest.raises(DataError, match=r"^data.sources.web has no documents that can be read: give a source"):
        write(tmp_path / "a.jsonl", ["", " "])
        tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer")
        prepared(tmp_path / "a.jsonl", tmp_path / "two", tokenizer=tokenizer)
