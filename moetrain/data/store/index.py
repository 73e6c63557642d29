"""`index.json` of a folder of prepared data: what its files hold, with their sizes and digests. Does not import torch.

The folder of a source holds
- `tokens-00000.bin`, ...: token ids without a header, all documents back to back, little endian, 16 or 32 bits each. A
  document is in one file. A token file may also belong to another program and lie outside the folder.
- `mask-00000.bin`: for a token file of which not all tokens are learned, pairs of int64 (start in the file, length) of
  the runs that are. The first token of a document is never learned. Without this file all others are.
- `documents.bin`: int64, end of each document, counted over all token files. `split.bin`: uint8, `Part` of each.
- `rows-LENGTH.bin` and `pieces-LENGTH.bin`: which documents share a row of LENGTH tokens (`store.plan`).
- `tokenizer/`: the tokenizer.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.data.config import DataConfig, SourceKind
from moetrain.errors import DataError
from moetrain.files import read_json_or_empty, sha256_of, user_path, write_json

INDEX, DOCUMENTS, SPLIT, TOKENIZER = "index.json", "documents.bin", "split.bin", "tokenizer"
WORK = ".work"
"""Folder with the finished shards of a preparation that has not finished."""
FORMAT = "moetrain tokens"
VERSION = 1
ENDS = np.dtype("<i8")
RUNS = np.dtype("<i8")
_CURE = "prepare the data again with moetrain prepare, into another folder"


class Part(IntEnum):
    """What a document is for."""

    training = 0
    held_out = 1
    left_out = 2
    """Not read: it repeats another document."""


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file by its name in the folder, or by its absolute path, with its size in bytes and its sha256."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class TokenFile(StoredFile):
    """A token file. dtype: numpy's name, such as "<u2". mask: the runs of learned tokens, if not all are learned."""

    num_tokens: int
    dtype: str
    mask: StoredFile | None = None


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Numbers of a prepared source. Characters and tokens are those of the documents that training or validation reads.

    num_left_out: documents in the token files that nothing reads, because they repeat another one.
    """

    num_read: int = 0
    """Documents of the source."""
    num_unreadable: int = 0
    """Records dropped because their format could not read them; they are not among those read."""
    num_empty: int = 0
    num_identical: int = 0
    """Documents dropped because an earlier one has the same text."""
    num_similar: int = 0
    """Documents dropped because their MinHash matches that of an earlier one."""
    num_contaminated: dict[str, int] = field(default_factory=dict)
    """Documents dropped because they share an n-gram with an evaluation set, by set."""
    num_long: int = 0
    """Documents whose text was tokenized in parts."""
    num_left_out: int = 0
    num_training: int = 0
    num_held_out: int = 0
    num_tokens: int = 0
    num_tokens_held_out: int = 0
    num_characters: int = 0


@dataclass(frozen=True, kw_only=True)
class Index:
    """Content of `index.json`.

    tokenizer: sha256 of the tokenizer. source: the config that was prepared. split_rule: how held-out documents were
    chosen. inputs: number of files and their bytes.
    """

    tokenizer: str
    vocab_size: int
    files: list[TokenFile]
    documents: StoredFile
    split: StoredFile
    counts: Counts
    source: dict[str, Any]
    split_rule: dict[str, Any]
    inputs: dict[str, int]
    format: str = FORMAT
    version: int = VERSION

    def stored_files(self) -> Iterator[StoredFile]:
        """Yield every file that the index names."""
        yield from (self.documents, self.split)
        for file in self.files:
            yield file
            if file.mask is not None:
                yield file.mask


def write_index(folder: Path, index: Index) -> None:
    """Write `index.json`, with which the folder is complete."""
    write_json(folder / INDEX, asdict(index))


def read_index(folder: Path) -> Index:
    """Return the index of a folder. Raises DataError that names the folder when it is missing, damaged or newer."""
    path = folder / INDEX
    if not path.is_file():
        sources = sorted(item.parent for item in folder.glob(f"*/{INDEX}"))
        if (folder / WORK).is_dir():
            problem = "holds a preparation that has not finished: run its command again"
        elif sources:
            problem = f"has no {INDEX}: give the folder of one source, such as {sources[0]}"
        elif not folder.exists():
            problem = "does not exist: give the folder of a source that moetrain prepare wrote"
        else:
            problem = f"has no {INDEX}: {_CURE}"
        raise DataError(f"{folder} {problem}")
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT or content["version"] != VERSION:
            raise DataError(
                f"{path} has format {content['format']!r} of version {content['version']}, and this version of "
                f"moetrain reads {FORMAT!r} of version {VERSION}: {_CURE}"
            )
        return _index_of(content)
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is damaged ({type(error).__name__}: {reason}): {_CURE}") from error


def _index_of(content: Mapping[str, Any]) -> Index:
    if unknown := content.keys() - {each.name for each in fields(Index)}:
        raise KeyError(f"unknown keys {sorted(unknown)}")
    files = [
        TokenFile(**{**file, "mask": StoredFile(**file["mask"]) if file["mask"] is not None else None})
        for file in content["files"]
    ]
    parts = {"documents": StoredFile(**content["documents"]), "split": StoredFile(**content["split"])}
    index = Index(**{**content, **parts, "files": files, "counts": Counts(**content["counts"])})
    _check_values(index)
    return index


def _check_values(index: Index) -> None:
    """Raise ValueError for a number, a text or a mapping that is something else, and for files of another size."""
    counts = asdict(index.counts)
    mappings = {"num_contaminated": counts.pop("num_contaminated"), "inputs": index.inputs, "source": index.source}
    numbers: dict[str, Any] = {"vocab_size": index.vocab_size, **counts}
    texts: dict[str, Any] = {"tokenizer": index.tokenizer}
    for place, file in enumerate(index.stored_files()):
        numbers[f"bytes of file {place}"] = file.bytes
        texts |= {f"name of file {place}": file.name, f"sha256 of file {place}": file.sha256}
    for name, value in {**mappings, "split_rule": index.split_rule}.items():
        if not isinstance(value, dict):
            raise ValueError(f"{name} is {value!r}")
    numbers |= {f"num_contaminated of {name}": value for name, value in mappings["num_contaminated"].items()}
    for name, value in texts.items():
        if not isinstance(value, str):
            raise ValueError(f"{name} is {value!r}")
    for file in index.files:
        numbers[f"num_tokens of {file.name}"] = file.num_tokens
    for name, value in numbers.items():
        if type(value) is not int or value < 0:
            raise ValueError(f"{name} is {value!r}")
    if not index.files:
        raise ValueError("files is empty")
    for file in index.files:
        if file.num_tokens * np.dtype(file.dtype).itemsize > file.bytes:
            raise ValueError(f"num_tokens of {file.name} is {file.num_tokens}, and it has {file.bytes} bytes")


def is_prepared(folder: Path) -> bool:
    """Return whether a folder holds prepared data."""
    path = folder / INDEX
    return path.is_file() and read_json_or_empty(path).get("format") == FORMAT


def index_digest(folder: Path) -> str:
    """Return the sha256 of `index.json`, which holds the digests of all files."""
    return sha256_of(folder / INDEX)


def check_sizes(folder: Path, index: Index) -> None:
    """Raise DataError that names the first file that is missing or has another size than in the index."""
    for file in index.stored_files():
        path = folder / file.name
        size = path.stat().st_size if path.is_file() else None
        if size != file.bytes:
            found = "is missing" if size is None else f"has {size} bytes"
            raise DataError(f"{path} {found}, and {folder / INDEX} names {file.bytes} bytes: copy it again, or {_CURE}")
    num_tokens = sum(file.num_tokens for file in index.files)
    last = _last_end(folder / index.documents.name)
    if last != num_tokens:
        raise DataError(
            f"{folder / index.documents.name} ends at token {last}, and the files that {folder / INDEX} names "
            f"have {num_tokens} tokens: copy them again, or {_CURE}"
        )


def _last_end(path: Path) -> int:
    """Return the end of the last document; 0 without documents."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if not size:
            return 0
        file.seek(size - ENDS.itemsize)
        return int(np.frombuffer(file.read(), dtype=ENDS)[0])


def check_contents(folder: Path, index: Index) -> None:
    """Read all files; raise DataError that names the first whose sha256 differs from the index."""
    check_sizes(folder, index)
    for file in index.stored_files():
        if sha256_of(folder / file.name) != file.sha256:
            raise DataError(f"{folder / file.name} has other content than {INDEX} states: copy it again, or {_CURE}")


def prepared_folders(config: DataConfig) -> dict[str, Path]:
    """Return the folder of each prepared source."""
    return {
        name: user_path(source.path)
        for name, source in config.sources.items()
        if source.kind is SourceKind.prepared and source.path is not None
    }
