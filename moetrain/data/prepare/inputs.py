"""The input of a source, cut into units, and units grouped into shards. Does not import torch.

A unit is what one process reads alone: a file, a range of bytes of an uncompressed JSONL file, a range of row groups of
a parquet file, a part of a hub data set, or a generated source. Units and shards depend on the names and sizes of the
files and on `shard_bytes` only, so any number of processes writes the same files.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moetrain.data.config import FOREIGN_KINDS, SourceConfig, SourceKind, Unreadable
from moetrain.data.files import is_compressed, json_records
from moetrain.data.formats import Document
from moetrain.data.hub import HubPart, hub_parts, part_records
from moetrain.data.sources import (
    all_documents,
    documents_of,
    local_files,
    parquet_groups,
    parquet_records,
    text_documents,
)

_TOKENS = {SourceKind.megatron: ".bin", SourceKind.datatrove: ".ds"}
"""Ending of the token file, by kind."""
_MAX_RECORD = 1 << 28  # bytes of a line of JSONL
_MAX_TEXT = 1 << 24  # characters of a document of a text file


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Input that one process reads. begin, end: bytes, row groups or parts; an end of None reads to the last."""

    size: int
    """Bytes, as far as they are known."""
    path: str | None = None
    begin: int = 0
    end: int | None = None
    file_bytes: int | None = None
    """Bytes of the whole file, for a part of it: where lines start depends on all bytes before. For a data set that
    `datasets` reads from a local folder, the bytes of its files."""
    revision: str | None = None
    """Revision of a hub data set."""

    def changed_after(self, written: Path) -> bool:
        """Return whether the unit's file was modified after the file `written`."""
        return self.path is not None and Path(self.path).stat().st_mtime_ns > written.stat().st_mtime_ns


def units_of(config: SourceConfig, *, shard_bytes: int) -> list[Unit]:
    """Return the units of a source, in order. Raises DataError that names what cannot be read."""
    if config.kind is SourceKind.hub:
        if config.max_characters is not None:  # one process counts the characters
            return [Unit(size=shard_bytes)]
        return [
            Unit(
                size=shard_bytes,
                begin=part.number,
                end=part.num_parts,
                file_bytes=part.local_bytes,
                revision=part.revision,
            )
            for part in hub_parts(config)
        ]
    if config.path is None:
        return [Unit(size=shard_bytes)]
    return [unit for path in local_files(config) for unit in _of_file(path, config, shard_bytes=shard_bytes)]


def _of_file(path: Path, config: SourceConfig, *, shard_bytes: int) -> list[Unit]:
    if config.kind in FOREIGN_KINDS:
        return [Unit(path=str(path), size=path.with_suffix(_TOKENS[config.kind]).stat().st_size)]
    size = path.stat().st_size
    if size > shard_bytes and config.kind is SourceKind.parquet:
        groups = parquet_groups(path)
        per_unit = max(1, len(groups) * shard_bytes // size)
        starts = range(0, len(groups), per_unit)
        return [
            Unit(
                path=str(path),
                begin=begin,
                end=min(begin + per_unit, len(groups)),
                size=sum(groups[begin : begin + per_unit]),
                file_bytes=size,
            )
            for begin in starts
        ]
    if size > shard_bytes and config.kind is SourceKind.jsonl and not is_compressed(path) and not _is_array(path):
        return [
            Unit(path=str(path), begin=begin, end=end, size=end - begin, file_bytes=size)
            for begin in range(0, size, shard_bytes)
            for end in [min(begin + shard_bytes, size)]
        ]
    return [Unit(path=str(path), size=size)]


def _is_array(path: Path) -> bool:
    with path.open("rb") as file:
        while block := file.read(1 << 12):
            if text := block.lstrip(b"\xef\xbb\xbf \t\r\n"):
                return text.startswith(b"[")
    return False


def shards_of(units: list[Unit], *, shard_bytes: int) -> list[list[Unit]]:
    """Return the units of each shard: consecutive ones, of `shard_bytes` bytes or more together."""
    shards: list[list[Unit]] = []
    size = shard_bytes
    for unit in units:
        if size >= shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(unit)
        size += unit.size
    return shards


def unit_documents(config: SourceConfig, unit: Unit, *, errors: list[str]) -> Iterator[Document]:
    """Yield the documents of a unit, one at a time. Raises DataError that names the file and line.

    errors: gets the error of each record that `config.unreadable` drops.
    """
    broken = errors if config.unreadable is Unreadable.drop else None
    if config.kind is SourceKind.hub and unit.end is not None:
        part = HubPart(number=unit.begin, num_parts=unit.end, revision=unit.revision)
        yield from documents_of(part_records(config, part), config, errors=errors)
    elif unit.path is None:
        yield from all_documents(config, errors=errors)
    elif config.kind is SourceKind.text:
        yield from text_documents(Path(unit.path), max_characters=_MAX_TEXT, errors=broken)
    elif config.kind is SourceKind.parquet:
        groups = range(unit.begin, unit.end) if unit.end is not None else None
        column = config.column if config.format == "text" else None
        yield from documents_of(
            parquet_records(Path(unit.path), row_groups=groups, column=column, errors=broken), config, errors=errors
        )
    else:
        records = json_records(Path(unit.path), begin=unit.begin, end=unit.end, max_bytes=_MAX_RECORD, errors=broken)
        yield from documents_of(records, config, errors=errors)
