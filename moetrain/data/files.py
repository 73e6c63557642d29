"""Reads bytes, text and JSON records from local data files.

A file may be compressed with gzip or zstd and may begin with a byte-order mark. JSONL has one object per line; a file
that begins with `[` is read as one array of objects. Records are read one at a time, and a range of bytes of an
uncompressed JSONL file can be read alone, so that several processes share a large file.
"""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from moetrain.data.formats import Record
from moetrain.errors import DataError
from moetrain.files import RepeatedKeyError, without_repeats

_GZIP = b"\x1f\x8b"
_ZSTD = (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + number, 0x2A, 0x4D, 0x18]) for number in range(16)))
"""First bytes of a frame of zstd, and of a frame to skip, with which pzstd begins."""
_UTF8_MARK = b"\xef\xbb\xbf"
_NOT_READ = {
    b"BZh": "is compressed with bzip2: decompress it, or use gzip",
    b"\xfd7zXZ": "is compressed with xz: decompress it, or use gzip",
    b"PK\x03\x04": "is a zip archive: unpack it",
    b"\xff\xfe": "is UTF-16: convert it to UTF-8",
    b"\xfe\xff": "is UTF-16: convert it to UTF-8",
}
"""Error message by the first bytes of file types that are not supported."""
_MARK_BYTES = max(map(len, [_GZIP, *_ZSTD, *_NOT_READ]))
_BUFFER = 1 << 20  # bytes read at once
_LONGEST_LINE = 1 << 20  # bytes of a part of a line of a text file


@dataclass(frozen=True, kw_only=True)
class Place:
    """A line of a file, given by its first byte. The number of the line is counted only when a message shows it."""

    path: Path
    byte: int

    def __str__(self) -> str:
        """Return "FILE:LINE"."""
        number, left = 1, self.byte
        with self.path.open("rb") as file:
            while left > 0 and (data := file.read(min(left, _BUFFER))):
                number += data.count(b"\n")
                left -= len(data)
        return f"{self.path}:{number}"


def is_compressed(path: Path) -> bool:
    """Return whether a file is compressed with gzip or zstd. Raises DataError when it cannot be read."""
    with _reading(path), path.open("rb") as file:
        return file.read(_MARK_BYTES).startswith((_GZIP, *_ZSTD))


@contextmanager
def opened(path: Path) -> Iterator["io.BufferedReader[Any]"]:
    """Open a file for reading, decompressed and after its byte-order mark.

    Raises DataError that names the file, also for what goes wrong while it is read.
    """
    with _reading(path), io.FileIO(path) as unbuffered:
        stream = raw = io.BufferedReader(unbuffered, _BUFFER)
        first = raw.peek(_MARK_BYTES)
        if first.startswith(_GZIP):
            stream = io.BufferedReader(cast("io.FileIO", gzip.GzipFile(fileobj=raw)), _BUFFER)
        elif first.startswith(_ZSTD):
            import pyarrow  # imported here, because only compressed files use it

            stream = io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), _BUFFER)
        first = stream.peek(_MARK_BYTES)
        for mark, problem in _NOT_READ.items():
            if first.startswith(mark):
                raise DataError(f"{path} {problem}")
        if first.startswith(_UTF8_MARK):
            stream.read(len(_UTF8_MARK))
        yield stream


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:  # gzip.BadGzipFile is an OSError, as are the errors of pyarrow
        raise DataError(f"{path} cannot be read: {error}") from error


def text_lines(path: Path, *, errors: list[str] | None = None) -> Iterator[str]:
    """Yield the lines of a text file with `\\n` line ends; a line of more than 2^20 bytes comes in parts.

    errors: gets the error of each line that is not UTF-8, which is then left out, from the part on that is not. Raises
    DataError that names the file and the line.
    """
    with opened(path) as file:
        number = 1
        decoder = codecs.getincrementaldecoder("utf-8")()
        is_begun = False  # whether a part of the present line was returned
        while part := file.readline(_LONGEST_LINE):
            if part.endswith(b"\r"):
                part += file.readline(1)
            is_end = part.endswith(b"\n") or not file.peek(1)
            try:
                text = decoder.decode(part, final=is_end)
            except UnicodeDecodeError as error:
                problem = f"{path}:{number} is not UTF-8: {error.reason}"
                if errors is None:
                    raise DataError(problem) from error
                errors.append(problem)
                decoder.reset()
                text, is_end = "\n" if is_begun else "", True
                _skip_rest(file, part)
            *lines, rest = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
            yield from (f"{line}\n" for line in lines)
            if rest:
                yield rest
            number += is_end
            is_begun = not is_end


def _skip_rest(file: BinaryIO, line: bytes) -> int:
    """Read up to the end of the line of which `line` is the beginning; return the number of bytes."""
    num_skipped = 0
    while line and not line.endswith(b"\n"):
        line = file.readline(_BUFFER)
        num_skipped += len(line)
    return num_skipped


def json_records(
    path: Path,
    *,
    begin: int = 0,
    end: int | None = None,
    max_bytes: int | None = None,
    errors: list[str] | None = None,
) -> Iterator[tuple[object, Record]]:
    """Yield (place, record); a place prints as "FILE:LINE" or "FILE record NUMBER". A DataError begins with the place.

    begin, end: range of bytes of an uncompressed JSONL file; the lines that start in it are read. max_bytes: largest
    size of a line, or of a file that is one array; DataError beyond it. errors: gets the error of each line, or record
    of an array, that is no object, which is then left out.
    """
    limit = -1 if max_bytes is None else max_bytes + 1
    with opened(path) as file:
        position = _seek_line(file, begin) if begin else 0
        if begin == 0 and end is not None:
            position = file.tell()  # after the byte-order mark
        number = 0
        is_first = begin == 0
        while end is None or position < end:
            line = file.readline(limit)
            if not line:
                return
            number += 1
            where: object = Place(path=path, byte=position) if begin else f"{path}:{number}"
            if is_first and line.lstrip().startswith(b"["):
                content = line + file.read(limit)
                yield from _array(_within(content, where=path, max_bytes=max_bytes), path=path, errors=errors)
                return
            position += len(line)
            if not line.strip():
                continue
            is_first = False
            try:
                content = _within(line, where=where, max_bytes=max_bytes).removesuffix(b"\n")
                record = _object(_json(content, where=where), where=where)
            except DataError as error:
                if errors is None:
                    raise
                errors.append(str(error))
                position += _skip_rest(file, line)
                continue
            yield record


def _seek_line(file: BinaryIO, begin: int) -> int:
    """Move to the first line that starts at `begin` or later; return its position."""
    file.seek(begin - 1)
    return begin - 1 + len(file.readline())


def _within(data: bytes, *, where: object, max_bytes: int | None) -> bytes:
    if max_bytes is not None and len(data) > max_bytes:
        raise DataError(f"{where} is longer than {max_bytes >> 20} MiB: give one object per line, in shorter lines")
    return data


def _array(data: bytes, *, path: Path, errors: list[str] | None) -> Iterator[tuple[object, Record]]:
    for number, record in enumerate(_json(data, where=path), start=1):
        where = f"{path} record {number}"
        if errors is not None and not isinstance(record, dict):
            errors.append(f"{where} holds {type(record).__name__} where an object is expected")
            continue
        yield _object(record, where=where)


def _json(data: bytes, *, where: object) -> Any:
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=without_repeats)
    except RepeatedKeyError as error:
        raise DataError(f"{where} has the key {error.key!r} twice in one object: remove one of them") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8 at byte {error.start}: convert it, for example with iconv -t UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        problem = "it begins with a byte-order mark" if data.startswith(_UTF8_MARK) else error.msg
        raise DataError(
            f"{where} is not JSON: {problem} at column {error.colno}; give one object per line, or one array of them"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of open brackets
        raise DataError(f"{where} cannot be read: {type(error).__name__}: {str(error)[:80]}") from error


def _object(record: Any, *, where: object) -> tuple[object, Record]:
    if not isinstance(record, dict):
        raise DataError(
            f"{where} holds {type(record).__name__} where an object is expected: give one object per line, or one "
            "array of objects"
        )
    return where, record
