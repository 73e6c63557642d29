"""Token files of Megatron and datatrove, written here from the public descriptions of the formats."""

import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest

from moetrain.data.build import build_data
from moetrain.data.config import DataConfig, SourceConfig, SourceKind, TokenizerConfig
from moetrain.data.maths import maths_problems
from moetrain.data.prepare.config import PrepareConfig
from moetrain.data.prepare.run import prepare
from moetrain.data.store.index import Index
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import DataError


@pytest.fixture
def documents(tokenizer: Tokenizer) -> list[list[int]]:
    texts = list(maths_problems(seed=2, num_documents=60))
    return [[*ids, tokenizer.eos_id] for ids in tokenizer.encode_batch([*texts, texts[0], "x y " * 100])]


def write_megatron(path: Path, documents: list[list[int]]) -> None:
    """Write documents of two sequences each, as Megatron does for texts that are split into sentences."""
    sequences = [part for each in documents for part in (each[: len(each) // 2], each[len(each) // 2 :])]
    lengths = np.array([len(each) for each in sequences], dtype="<i4")
    starts = (np.cumsum(lengths, dtype="<i8") - lengths) * 4
    bounds = np.arange(0, len(sequences) + 1, 2, dtype="<i8")
    head = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 4, len(sequences), len(bounds))
    path.with_suffix(".idx").write_bytes(head + lengths.tobytes() + starts.astype("<i8").tobytes() + bounds.tobytes())
    path.with_suffix(".bin").write_bytes(np.concatenate(documents).astype("<i4").tobytes())


def write_datatrove(path: Path, documents: list[list[int]], *, loss: list[list[bool]] | None = None) -> None:
    path.write_bytes(np.concatenate(documents).astype("<u2").tobytes())
    path.with_name(f"{path.name}.index").write_bytes(np.cumsum([*map(len, documents)]).astype("<u8").tobytes())
    if loss is not None:
        path.with_name(f"{path.name}.loss").write_bytes(np.concatenate(loss).astype(np.bool_).tobytes())


def prepared(kind: SourceKind, path: Path, *, tokenizer: Tokenizer, tmp_path: Path, **options) -> Index:
    data = DataConfig(sources={"old": SourceConfig(kind=kind, path=str(path))}, seq_len=64, validation_fraction=0.1)
    return prepare(data, PrepareConfig(workers=1, **options), folder=tmp_path / "out", tokenizer=tokenizer)["old"]


def read_back(tmp_path: Path, *, overlong: str = "split") -> list[tuple[list[int], list[bool]]]:
    """Return tokens and loss mask of all training and validation documents of the prepared source."""
    source = SourceConfig(kind=SourceKind.prepared, path=str(tmp_path / "out" / "old"))
    config = DataConfig(sources={"old": source}, seq_len=2048, validation_rows=10**6, tokenizer=TokenizerConfig())
    data = build_data(config, 0, tokenizer_folder=tmp_path / "stage")
    rows = data.training["old"]
    found = []
    for batch in (rows.batch(range(rows.num_rows), pad_id=0), data.validation["old"].batch):
        for tokens, mask, segments in zip(batch.tokens_BT, batch.loss_mask_BT, batch.segments_BT, strict=True):
            for segment in range(1, int(segments.max()) + 1):
                inside = segments == segment
                found.append((tokens[inside].tolist(), mask[inside].tolist()))
    return sorted(found)


def expected(documents: list[list[int]]) -> list[tuple[list[int], list[bool]]]:
    distinct = {tuple(each) for each in documents}
    return sorted((list(each), [False] + [True] * (len(each) - 1)) for each in distinct)


def test_megatron_files_are_read_where_they_are(
    documents: list[list[int]], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    write_megatron(tmp_path / "text_document", documents)
    index = prepared(SourceKind.megatron, tmp_path / "text_document", tokenizer=tokenizer, tmp_path=tmp_path)
    assert (index.counts.num_read, index.counts.num_identical) == (len(documents), 1)
    assert not list((tmp_path / "out").rglob("tokens-*.bin"))
    assert read_back(tmp_path) == expected(documents)


def test_datatrove_files_are_read_with_their_loss_masks(
    documents: list[list[int]], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = tmp_path / "tokens"
    folder.mkdir()
    masks = [[index % 5 > 1 for index in range(len(each))] for each in documents]
    write_datatrove(folder / "a.ds", documents[:30])
    write_datatrove(folder / "b.ds", documents[30:], loss=masks[30:])
    prepared(SourceKind.datatrove, folder, tokenizer=tokenizer, tmp_path=tmp_path, near_duplicates=True)
    found = {tuple(tokens): mask for tokens, mask in read_back(tmp_path)}
    assert found[tuple(documents[3])] == [False] + [True] * (len(documents[3]) - 1)
    assert found[tuple(documents[40])] == [False, *masks[40][1:]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.with_suffix(".idx").write_bytes(b"other"), "a.idx is no index of Megatron"),
        (lambda path: path.with_suffix(".bin").write_bytes(b"1234"), "a.bin has 4 bytes, and .*a.idx names"),
        (
            lambda path: path.with_suffix(".idx").write_bytes(path.with_suffix(".idx").read_bytes()[:-8]),
            r"a.idx has \d+ bytes, and its 124 sequences need",
        ),
    ],
)
def test_damaged_files_of_megatron_are_named(
    damage, message: str, documents: list[list[int]], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    write_megatron(tmp_path / "a", documents)
    damage(tmp_path / "a")
    with pytest.raises(DataError, match=message):
        prepared(SourceKind.megatron, tmp_path / "a", tokenizer=tokenizer, tmp_path=tmp_path)


def test_tokens_of_another_tokenizer_and_cut_files_are_named(
    documents: list[list[int]], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    write_datatrove(tmp_path / "a.ds", [*documents, [500, 1]])
    with pytest.raises(DataError, match=r"a.ds token \d+ is 500, and the tokenizer has 400 tokens"):
        prepared(SourceKind.datatrove, tmp_path / "a.ds", tokenizer=tokenizer, tmp_path=tmp_path)
    (tmp_path / "a.ds").write_bytes(b"123")
    with pytest.raises(DataError, match=r"a.ds has 3 bytes, and a.ds.index names"):
        prepared(SourceKind.datatrove, tmp_path / "a.ds", tokenizer=tokenizer, tmp_path=tmp_path)


def test_a_near_duplicate_of_a_contaminated_document_is_kept(tokenizer: Tokenizer, tmp_path: Path) -> None:
    stream = random.Random(0)
    words = [f"w{number}" for number in range(3000)]
    asked, rest = stream.choices(words, k=13), stream.choices(words, k=400)
    other = [*asked[:6], "changed", *asked[7:]]
    texts = [" ".join([*rest[:200], *middle, *rest[200:]]) for middle in (asked, other)]
    texts += [" ".join(stream.choices(words, k=100)) for _ in range(20)]
    (tmp_path / "asked.jsonl").write_text(json.dumps({"text": " ".join(asked)}) + "\n")
    sets = {"asked": SourceConfig(kind=SourceKind.jsonl, path=str(tmp_path / "asked.jsonl"))}
    write_datatrove(tmp_path / "a.ds", [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts])
    options = {"tokenizer": tokenizer, "tmp_path": tmp_path, "near_duplicates": True}
    index = prepared(SourceKind.datatrove, tmp_path / "a.ds", decontaminate=sets, **options)
    assert (index.counts.num_contaminated, index.counts.num_similar) == ({"asked": 1}, 0)
    assert index.counts.num_training + index.counts.num_held_out == len(texts) - 1
