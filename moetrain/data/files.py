"""Reads bytes, text and JSON records from local data files.

A file may be compressed with gzip and may begin with a byte-order mark. JSONL has one object per line; a file that
begins with `[` is read as one array of objects.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moetrain.data.formats import Record
from moetrain.errors import DataError

_GZIP = b"\x1f\x8b"
_UTF8_MARK = b"\xef\xbb\xbf"
_NOT_READ = {
    b"\x28\xb5\x2f\xfd": "is compressed with zstd: decompress it, or use gzip",
    b"BZh": "is compressed with bzip2: decompress it, or use gzip",
    b"\xfd7zXZ": "is compressed with xz: decompress it, or use gzip",
    b"PK\x03\x04": "is a zip archive: unpack it",
    b"\xff\xfe": "is UTF-16: convert it to UTF-8",
    b"\xfe\xff": "is UTF-16: convert it to UTF-8",
}
"""Error message by the first bytes of file types that are not supported."""


def read_bytes(path: Path) -> bytes:
    """Return a file's content, decompressed and without a byte-order mark. Raises DataError that names the file."""
    try:
        data = path.read_bytes()
        if data.startswith(_GZIP):
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:  # gzip.BadGzipFile is an OSError
        raise DataError(f"{path} cannot be read: {error}") from error
    for first, problem in _NOT_READ.items():
        if data.startswith(first):
            raise DataError(f"{path} {problem}")
    return data.removeprefix(_UTF8_MARK)


def read_text(path: Path) -> str:
    """Return a file's text with `\\n` line ends. Raises DataError that names the file and the byte."""
    data = read_bytes(path)
    try:
        return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}") from error


def json_records(path: Path) -> Iterator[tuple[str, Record]]:
    """Yield (place, record); a place is "FILE:LINE" or "FILE record NUMBER". A DataError begins with the place."""
    data = read_bytes(path)
    if data.lstrip().startswith(b"["):
        records = _json(data, where=str(path))
        for number, record in enumerate(records, start=1):
            yield _object(record, where=f"{path} record {number}")
        return
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            yield _object(_json(line, where=where), where=where)


def _json(data: bytes, *, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where} is not JSON: {error.msg} at column {error.colno}; give one object per line, or one array of them"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of open brackets
        raise DataError(f"{where} cannot be read: {type(error).__name__}: {str(error)[:80]}") from error


def _object(record: Any, *, where: str) -> tuple[str, Record]:
    if not isinstance(record, dict):
        raise DataError(f"{where} holds {type(record).__name__} where an object is expected")
    return where, record
