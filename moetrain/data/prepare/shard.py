"""Writes one shard: the documents of its units as a token file, and what the later steps need to know of each.

A shard depends on its units, the tokenizer and the settings only. Its files get their names when they are complete;
`NUMBER.json` in the work folder is written last and marks the shard as done. Memory does not grow with the shard,
except for some ten bytes per document. Does not import torch.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np

from moetrain.chat.template import ChatTemplate
from moetrain.data.config import SourceConfig
from moetrain.data.formats import Document
from moetrain.data.prepare.contamination import EvaluationTexts
from moetrain.data.prepare.inputs import Unit, unit_documents
from moetrain.data.prepare.similar import NUM_BANDS, Bands
from moetrain.data.sources import Choice, key_hash, renderable
from moetrain.data.store.index import RUNS, WORK, StoredFile, TokenFile
from moetrain.data.tokenize import tokenize
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import DataError
from moetrain.files import atomic_file, read_json_or_empty, write_json

_BATCH_CHARACTERS, _BATCH_DOCUMENTS = 1 << 20, 512
"""Text that is tokenized per call."""
_MAX_CHARACTERS = 1 << 20
"""Longer texts are tokenized in parts."""
_TABLES = ("-documents.npy", "-keys.npy", "-positions.npy")
"""Ends of the names of the files of a `DocumentTable`."""
DOCUMENTS = np.dtype([("length", "<i8"), ("characters", "<i8"), ("hold_out", "<f8"), ("is_left_out", "?")])


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A shard to write.

    folder: that of the source. near_duplicates: whether MinHash keys are computed. made_of: digest of all that the
    content of the shard depends on.
    """

    number: int
    folder: Path
    name: str
    source: SourceConfig
    units: list[Unit]
    near_duplicates: bool
    made_of: str

    def work(self, what: str) -> Path:
        """Return the path of a file about this shard in the work folder."""
        return self.folder / WORK / f"{self.number:05d}{what}"

    @property
    def is_done(self) -> bool:
        """Return whether the shard has been written, of the same input and settings."""
        result = self.work(".json")
        is_same = read_json_or_empty(result).get("made_of") == self.made_of
        return is_same and not any(unit.changed_after(result) for unit in self.units) and self._is_whole()

    def _is_whole(self) -> bool:
        """Return whether the files of a finished shard can be read and have their sizes."""
        try:
            file = read_result(self).file
            stored = [file, file.mask] if file.mask else [file]
            for name in _TABLES:
                np.load(self.work(name), mmap_mode="r")
            return all((self.folder / each.name).stat().st_size == each.bytes for each in stored)
        except (OSError, ValueError, EOFError, KeyError, TypeError):
            return False


@dataclass(kw_only=True)
class ShardCounts:
    """Counts of the documents of a shard. num_long: documents tokenized in parts."""

    num_read: int = 0
    num_unreadable: int = 0
    first_unreadable: str = ""
    num_empty: int = 0
    num_identical: int = 0
    num_contaminated: dict[str, int] = field(default_factory=dict)
    num_long: int = 0
    num_documents: int = 0


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """What the work folder holds of a finished shard."""

    file: TokenFile
    counts: ShardCounts


def read_result(shard: Shard) -> ShardResult:
    """Return the result of a finished shard."""
    content = json.loads(shard.work(".json").read_bytes())
    mask = content["file"]["mask"]
    file = TokenFile(**{**content["file"], "mask": StoredFile(**mask) if mask else None})
    return ShardResult(file=file, counts=ShardCounts(**content["counts"]))


def write_shard(shard: Shard, *, tokenizer: Tokenizer, evaluation: EvaluationTexts) -> None:
    """Read, tokenize and write the documents of a shard. Raises DataError that names the source, file and line."""
    counts = ShardCounts(num_contaminated=dict.fromkeys(evaluation.names, 0))
    bands = Bands() if shard.near_duplicates else None
    table, template = DocumentTable(shard), tokenizer.template_or_none
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    try:
        with TokenWriter(shard.folder, number=shard.number, dtype=dtype) as writer:
            for batch in _batches(_chosen(shard, counts=counts, evaluation=evaluation, template=template)):
                documents = [each.document for each in batch]
                tokenized = tokenize(documents, tokenizer, max_characters=_MAX_CHARACTERS)
                for each, (tokens_N, mask_N) in zip(batch, tokenized, strict=True):
                    writer.append(tokens_N, mask_N)
                    counts.num_long += len(each.text) > _MAX_CHARACTERS
                    table.add(
                        length=len(tokens_N),
                        characters=sum(len(piece.text) for piece in each.document.pieces if not piece.is_special),
                        hold_out=key_hash(each.document.key, choice=Choice.hold_out),
                        keys=[each.identity, *(bands.keys(each.document.words) if bands else ())],
                    )
            file = writer.finish()
    except DataError as error:
        raise DataError(f"data.sources.{shard.name}: {error}") from error
    counts.num_documents = table.num_documents
    table.save()
    write_json(shard.work(".json"), {"made_of": shard.made_of, **asdict(ShardResult(file=file, counts=counts))})


class DocumentTable:
    """Records of the documents of a shard, which later steps read.

    Saves `NUMBER-documents.npy` (dtype `DOCUMENTS`), `NUMBER-keys.npy` (uint64 [K, D], each of the K kinds of keys
    sorted) and `NUMBER-positions.npy` (uint32 [K, D], the documents of the sorted keys). The first key is a hash of the
    whole document; the others are those of MinHash.
    """

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._num_keys = 1 + (NUM_BANDS if shard.near_duplicates else 0)
        self._documents: list[tuple[int, int, float, bool]] = []
        self._keys: list[list[int]] = []

    @property
    def num_documents(self) -> int:
        """Number of documents so far."""
        return len(self._documents)

    def add(self, *, length: int, characters: int, hold_out: float, keys: list[int], is_left_out: bool = False) -> None:
        """Add a document. hold_out: the hash that decides about validation. is_left_out: it is never read."""
        self._documents.append((length, characters, hold_out, is_left_out))
        self._keys.append(keys)

    def save(self) -> None:
        """Write the files, atomically."""
        keys_KD = np.array(self._keys, dtype=np.uint64).reshape(-1, self._num_keys).T
        order_KD = np.argsort(keys_KD, axis=1, kind="stable")
        tables: list[np.ndarray] = [
            np.array(self._documents, dtype=DOCUMENTS),
            np.take_along_axis(keys_KD, order_KD, axis=1),
            order_KD.astype(np.uint32),
        ]
        for name, table in zip(_TABLES, tables, strict=True):
            _save(self._shard.work(name), table)


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """A document to tokenize, with its text and the hash of it."""

    document: Document
    text: str
    identity: int


def _chosen(
    shard: Shard, *, counts: ShardCounts, evaluation: EvaluationTexts, template: ChatTemplate | None
) -> Iterator[_Chosen]:
    """Yield the documents that have text, are new in the shard, and share no n-gram with an evaluation set."""
    seen: set[int] = set()
    errors = FirstOf()
    for unit in shard.units:
        documents = unit_documents(shard.source, unit, errors=errors)
        for document in renderable(documents, shard.source, template=template, errors=errors):
            counts.num_read += 1
            if not document.has_text:
                counts.num_empty += 1
                continue
            text = document.text
            identity = _identity(document.identity)
            if identity in seen:
                counts.num_identical += 1
                continue
            seen.add(identity)
            if (name := evaluation.found_in(document.words)) is not None:
                counts.num_contaminated[name] += 1
                continue
            yield _Chosen(document=document, text=text, identity=identity)
    counts.num_unreadable = errors.num_appended
    counts.first_unreadable = next(iter(errors), "")


class FirstOf(list[str]):
    """A list that keeps the first text that is appended, and counts all."""

    def __init__(self) -> None:
        super().__init__()
        self.num_appended = 0

    def append(self, text: str) -> None:
        """Count a text, and keep it if it is the first."""
        self.num_appended += 1
        if not self:
            super().append(text)


def _batches(documents: Iterator[_Chosen]) -> Iterator[list[_Chosen]]:
    batch: list[_Chosen] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _identity(text: str) -> int:
    """Return 64 bits of a hash of the text. Among 10^9 documents, two have the same by chance with probability 3 %."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _save(path: Path, array: np.ndarray) -> None:
    """Write a .npy file atomically."""
    with atomic_file(path) as scratch, scratch.open("wb") as file:
        np.save(file, array)


class TokenWriter:
    """Writes a token file and, where not all tokens are learned, its mask file."""

    def __init__(self, folder: Path, *, number: int, dtype: np.dtype) -> None:
        self._path = folder / f"tokens-{number:05d}.bin"
        self._mask_path = folder / f"mask-{number:05d}.bin"
        self._dtype = dtype
        self._sha256 = hashlib.sha256()
        self._num_tokens = 0
        self._runs: list[np.ndarray] = []
        self._is_all_learned = True

    def __enter__(self) -> "TokenWriter":
        self._stack = ExitStack()
        scratch = self._stack.enter_context(atomic_file(self._path))
        self._file = self._stack.enter_context(scratch.open("wb", buffering=1 << 20))
        return self

    def append(self, tokens_N: np.ndarray, mask_N: np.ndarray) -> None:
        """Append a document: token ids and bool mask, [N]."""
        data = tokens_N.astype(self._dtype).tobytes()
        self._file.write(data)
        self._sha256.update(data)
        self._is_all_learned &= bool(mask_N[1:].all())
        self._runs.append(learned_runs(mask_N, start=self._num_tokens))
        self._num_tokens += len(tokens_N)

    def finish(self) -> TokenFile:
        """Write the mask file; return the entry of both files in the index. The token file is complete on exit."""
        return TokenFile(
            name=self._path.name,
            bytes=self._num_tokens * self._dtype.itemsize,
            sha256=self._sha256.hexdigest(),
            num_tokens=self._num_tokens,
            dtype=self._dtype.str,
            mask=None if self._is_all_learned else write_runs(self._mask_path, self._runs),
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)


def learned_runs(mask_N: np.ndarray, *, start: int) -> np.ndarray:
    """Return (start, length) of the runs of learned tokens of a document that starts at `start`, int64 [R, 2].

    The first token of a document is not learned, because nothing precedes it.
    """
    if mask_N[1:].all():
        return np.array([[start + 1, len(mask_N) - 1]] if len(mask_N) > 1 else np.zeros((0, 2)), dtype=RUNS)
    learned = mask_N.copy()
    learned[:1] = False
    edges = np.flatnonzero(np.diff(learned, prepend=False, append=False)).reshape(-1, 2)
    return np.stack([edges[:, 0] + start, edges[:, 1] - edges[:, 0]], axis=1).astype(RUNS)


def write_runs(path: Path, runs: list[np.ndarray]) -> StoredFile:
    """Write a mask file atomically; return its entry of the index. runs: (start, length) pairs, int64 [R, 2] each."""
    sha256 = hashlib.sha256()
    size = 0
    with atomic_file(path) as scratch, scratch.open("wb") as file:
        for each in runs:
            data = each.astype(RUNS).tobytes()
            file.write(data)
            sha256.update(data)
            size += len(data)
    return StoredFile(name=path.name, bytes=size, sha256=sha256.hexdigest())
