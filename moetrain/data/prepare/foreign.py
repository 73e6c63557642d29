"""Takes token files of Megatron and datatrove as shards, without copying them. Does not import torch.

Megatron (`megatron/core/datasets/indexed_dataset.py`): NAME.bin holds the tokens. NAME.idx holds the magic bytes
MMIDIDX and two zeros, the version (uint64, 1), a code of the dtype (uint8), the number of sequences and of document
bounds (uint64), the length of each sequence (int32), its first byte in NAME.bin (int64), and the sequence at which each
document begins, with a last bound (int64).

datatrove (`datatrove/pipeline/tokens`): NAME.ds holds the tokens as uint16 or uint32, NAME.ds.index the end of each
document in tokens (uint64), and NAME.ds.loss, where it exists, one byte per token that tells whether it is learned.
"""

import hashlib
import struct
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from moetrain.data.config import SourceKind
from moetrain.data.prepare.contamination import EvaluationTexts
from moetrain.data.prepare.shard import (
    DocumentTable,
    Shard,
    ShardCounts,
    ShardResult,
    learned_runs,
    write_runs,
)
from moetrain.data.prepare.similar import Bands
from moetrain.data.sources import Choice, key_hash
from moetrain.data.store.index import TokenFile
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import DataError
from moetrain.files import write_json

_MAGIC = b"MMIDIDX\x00\x00"
_HEAD = struct.Struct("<9sQBQQ")
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Integer dtypes by Megatron's code; 6 and 7 are floats."""


@dataclass(frozen=True, kw_only=True)
class ForeignTokens:
    """A token file of another program. ends: int64, end of each document in tokens. loss: file of learned tokens."""

    path: Path
    dtype: str
    ends: np.ndarray
    loss: Path | None = None


def write_foreign(shard: Shard, *, tokenizer: Tokenizer, evaluation: EvaluationTexts) -> None:
    """Read a token file of another program as the shard; its tokens stay where they are.

    Raises DataError that names the file when it is damaged or has tokens that the tokenizer lacks.
    """
    (unit,) = shard.units
    assert unit.path is not None
    tokens = read_foreign(Path(unit.path), kind=shard.source.kind)
    counts = ShardCounts(num_contaminated=dict.fromkeys(evaluation.names, 0))
    table = DocumentTable(shard)
    bands = Bands() if shard.near_duplicates else None
    data = _mapped(tokens.path, np.dtype(tokens.dtype))
    loss = _mapped(tokens.loss, np.dtype(np.bool_)) if tokens.loss is not None else None
    sha256 = hashlib.sha256()
    runs = []
    is_all_learned = True
    begin = 0
    for end in tokens.ends.tolist():
        document = data[begin:end]
        sha256.update(document.tobytes())
        _check_range(document, begin=begin, path=tokens.path, vocab_size=tokenizer.vocab_size)
        key = hashlib.sha256(document.astype(np.int64).tobytes())
        learned = np.array(loss[begin:end]) if loss is not None else None
        identity = hashlib.sha256(key.digest() + (learned.tobytes() if learned is not None else b""))
        text = tokenizer.decode(document.tolist()) if bands or evaluation.names else ""
        counts.num_read += 1
        counts.num_empty += begin == end
        name = evaluation.found_in(text)
        if name is not None:
            counts.num_contaminated[name] += 1
        table.add(
            length=end - begin,
            characters=len(text),
            hold_out=key_hash(key.hexdigest(), choice=Choice.hold_out),
            keys=[int.from_bytes(identity.digest()[:8], "little"), *(bands.keys(text) if bands else ())],
            is_left_out=name is not None or begin == end,
        )
        if learned is not None:
            is_all_learned &= bool(learned[1:].all())
            runs.append(learned_runs(learned, start=begin))
        begin = end
    counts.num_documents = len(tokens.ends)
    mask_path = shard.folder / f"mask-{shard.number:05d}.bin"
    file = TokenFile(
        name=str(tokens.path.resolve()),
        bytes=tokens.path.stat().st_size,
        sha256=sha256.hexdigest(),
        num_tokens=begin,
        dtype=tokens.dtype,
        mask=None if is_all_learned else write_runs(mask_path, runs),
    )
    table.save()
    write_json(shard.work(".json"), {"made_of": shard.made_of, **asdict(ShardResult(file=file, counts=counts))})


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """Return a file as an array; an empty file cannot be mapped."""
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)


def _check_range(document: np.ndarray, *, begin: int, path: Path, vocab_size: int) -> None:
    if len(document) and not (document.min() >= 0 and document.max() < vocab_size):
        place = int(np.argmax((document < 0) | (document >= vocab_size)))
        raise DataError(
            f"{path} token {begin + place} is {int(document[place])}, and the tokenizer has {vocab_size} tokens: give "
            "the tokenizer that the file was made with as data.tokenizer.path"
        )


def read_foreign(path: Path, *, kind: SourceKind) -> ForeignTokens:
    """Return the bounds and the dtype of a token file. Raises DataError that names the file and what is wrong."""
    try:
        return _megatron(path) if kind is SourceKind.megatron else _datatrove(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _megatron(path: Path) -> ForeignTokens:
    path, tokens = path.with_suffix(".idx"), path.with_suffix(".bin")
    data = path.read_bytes()
    if len(data) < _HEAD.size or not data.startswith(_MAGIC):
        raise DataError(f"{path} is no index of Megatron: it does not begin with {_MAGIC[:7].decode()}")
    _, version, code, num_sequences, num_bounds = _HEAD.unpack_from(data)
    if version != 1 or code not in _DTYPES:
        raise DataError(
            f"{path} has version {version} and dtype code {code}: only version 1 with integers is supported; convert it"
        )
    needed = _HEAD.size + 12 * num_sequences + 8 * num_bounds
    if len(data) < needed:
        raise DataError(f"{path} has {len(data)} bytes, and its {num_sequences} sequences need {needed}: copy it again")
    itemsize = np.dtype(_DTYPES[code]).itemsize
    lengths = np.frombuffer(data, "<i4", num_sequences, _HEAD.size).astype(np.int64)
    starts = np.frombuffer(data, "<i8", num_sequences, _HEAD.size + 4 * num_sequences)
    bounds = np.frombuffer(data, "<i8", num_bounds, _HEAD.size + 12 * num_sequences)
    ends = np.concatenate(([0], np.cumsum(lengths)))
    is_ordered = (starts == ends[:-1] * itemsize).all() and (np.diff(bounds) >= 0).all()
    if not is_ordered or bounds[:1].tolist() != [0] or bounds[-1] != num_sequences:
        raise DataError(
            f"{path} has sequences that are not contiguous: write the data set again with Megatron's builder"
        )
    _check_size(tokens, int(ends[-1]) * itemsize, index=path)
    return ForeignTokens(path=tokens, dtype=_DTYPES[code], ends=ends[bounds][1:])


def _datatrove(path: Path) -> ForeignTokens:
    index, loss = path.with_name(f"{path.name}.index"), path.with_name(f"{path.name}.loss")
    if index.stat().st_size % 8:
        raise DataError(f"{index} has {index.stat().st_size} bytes, which is no multiple of 8: copy it again")
    ends = np.fromfile(index, dtype="<u8").astype(np.int64)
    num_tokens = int(ends[-1]) if len(ends) else 0
    if (np.diff(ends, prepend=0) < 0).any():
        raise DataError(f"{index} has document ends that decrease: copy it again")
    size = path.stat().st_size
    dtypes = {num_tokens * 2: "<u2", num_tokens * 4: "<u4"}
    if size not in dtypes:
        raise DataError(f"{path} has {size} bytes, and {index.name} names {num_tokens} tokens of 2 or 4: copy it again")
    if loss.is_file():
        _check_size(loss, num_tokens, index=index)
    return ForeignTokens(path=path, dtype=dtypes[size], ends=ends, loss=loss if loss.is_file() else None)


def _check_size(path: Path, size: int, *, index: Path) -> None:
    found = path.stat().st_size
    if found != size:
        raise DataError(f"{path} has {found} bytes, and {index} names {size}: copy it again")
