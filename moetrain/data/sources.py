"""Reads the documents of each source before tokenization, and computes their digest.

A local path is a file, a folder or a glob; a path that exists is not read as a glob. In JSONL each line is a record,
and all lines are checked before any is used. In parquet each row is a record. A text file is cut at blank lines into
documents of 4,000 characters or more, so that a single large file can be split into training and validation. Empty and
repeated documents are dropped, and the log states their number.

This module parses JSONL itself, because `datasets` fits one schema to all records: the arguments of a tool call would
gain the keys of all other calls. Dialogues do not pass through this module; they are already tokens.
"""

import glob
import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

from moetrain.data.config import SourceConfig, SourceKind, Unreadable
from moetrain.data.files import json_records, read_text
from moetrain.data.formats import Document, Record, document_of, format_named, text_document
from moetrain.data.maths import maths_problems
from moetrain.data.stdlib import stdlib_code, stdlib_english
from moetrain.errors import DataError

_log = logging.getLogger(__name__)

Reader = Callable[[SourceConfig, list[str]], Iterator[Document]]
"""Reads a source; adds the errors of dropped records to the list."""

_ENDINGS = {
    SourceKind.jsonl: (".jsonl", ".json", ".jsonl.gz", ".json.gz"),
    SourceKind.parquet: (".parquet",),
    SourceKind.text: (".txt", ".md", ".rst", ".py", ".txt.gz"),
}
"""Endings of the files that are read from a folder, by kind."""
_MIN_TEXT = 4000
"""Characters after which a text file is cut at the next blank line."""
_MATHS_SEED = 0
"""Fixed, because the run's seed changes the order of a source's documents and not their content."""


def read_documents(config: SourceConfig, *, name: str, unreadable: list[str] | None = None) -> list[Document]:
    """Return the documents of one source, each text once, up to `max_characters`.

    unreadable: gets the error of each record that `config.unreadable` drops.

    Raises DataError that names the file and line, the path or the column; or the source, when it is empty.
    """
    errors: list[str] = [] if unreadable is None else unreadable
    documents = _distinct(_READERS[config.kind](config, errors), name=name)
    if errors:
        _log.warning("data.sources.%s: %d unreadable records dropped; the first is %s", name, len(errors), errors[0])
    if config.max_characters is not None:
        documents = _up_to(documents, config.max_characters)
    if not documents:
        place = f" in {config.path}" if config.path else ""
        cap = f" within max_characters={config.max_characters}" if config.max_characters is not None else ""
        raise DataError(f"data.sources.{name} has no documents{place}{cap}: give a source that contains text")
    return documents


class Choice(StrEnum):
    """Purposes for which documents are chosen by hash. The value is the salt of the hash.

    With one salt the choices would depend on each other: the documents with the lowest hashes would be both kept by
    `max_characters` and held out.
    """

    keep = "keep"
    """Chooses the documents that `max_characters` keeps."""
    hold_out = "hold_out"
    """Chooses the documents for validation."""
    train_tokenizer = "train_tokenizer"
    """Chooses the documents that a tokenizer is trained on."""


def key_hash(key: str, *, choice: Choice) -> float:
    """Return a number in [0, 1) that depends on `key` and `choice` only."""
    data = key.encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(data, digest_size=8, salt=choice.value.encode()).digest()
    return int.from_bytes(digest, "big") / 2.0**64


def digest_of(documents: Iterable[Document]) -> str:
    """Return the sha256 over the documents' texts, in order."""
    digest = hashlib.sha256()
    for document in documents:
        data = document.text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def local_files(config: SourceConfig) -> list[Path]:
    """Return the files that `path` names, sorted. Raises DataError that names the path when there are none."""
    assert config.path is not None  # SourceConfig checks it
    path = Path(config.path).expanduser()
    if path.is_dir():
        endings = _ENDINGS[config.kind]
        files = sorted(item for item in path.rglob("*") if item.is_file() and item.name.endswith(endings))
        if not files:
            raise DataError(f"{path} holds no file that ends in {' or '.join(endings)}")
        return files
    if path.is_file():
        return [path]
    files = sorted(Path(item) for item in glob.glob(str(path), recursive=True) if Path(item).is_file())
    if not files:
        wrong = "is no regular file" if path.exists() else "does not exist"
        raise DataError(f"{path} {wrong}: give a file, a glob or a folder of {config.kind} files")
    return files


def _from_stdlib(texts: Callable[[], dict[str, str]]) -> Reader:
    def read(config: SourceConfig, errors: list[str]) -> Iterator[Document]:
        return (text_document(text, key=f"stdlib:{path}") for path, text in texts().items())

    return read


def _maths(config: SourceConfig, errors: list[str]) -> Iterator[Document]:
    texts = maths_problems(seed=_MATHS_SEED, num_documents=config.num_documents)
    return (text_document(text) for text in texts)


def _jsonl(config: SourceConfig, errors: list[str]) -> Iterator[Document]:
    records = [record for path in local_files(config) for record in json_records(path)]
    return _documents(records, config, errors)


def _text(config: SourceConfig, errors: list[str]) -> Iterator[Document]:
    for path in local_files(config):
        yield from map(text_document, _cut(read_text(path)))


def _cut(text: str) -> Iterator[str]:
    begin = 0
    for blank in re.finditer(r"\n\s*\n", text):
        if blank.end() - begin >= _MIN_TEXT:
            yield text[begin : blank.end()]
            begin = blank.end()
    if text[begin:].strip():
        yield text[begin:]


def _parquet(config: SourceConfig, errors: list[str]) -> Iterator[Document]:
    return _documents((record for path in local_files(config) for record in _rows(path)), config, errors)


def _rows(path: Path) -> Iterator[tuple[str, Record]]:
    import pyarrow  # imported here, because only parquet sources use it
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    yield f"{path} row {number}", _columns(record)
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{path} cannot be read: {lines[0]}") from error


def _hub(config: SourceConfig, errors: list[str]) -> Iterator[Document]:
    assert config.path is not None  # SourceConfig checks it
    name, _, subset = config.path.partition(":")
    is_capped = config.max_characters is not None
    records = _load(name, config, name=subset or None, split=config.split, streaming=is_capped)
    num_characters = 0
    for document in _documents(records, config, errors):
        num_characters += len(document.text)
        if config.max_characters is not None and num_characters > config.max_characters:
            return
        yield document


def _load(builder: str, config: SourceConfig, **options: Any) -> Iterator[tuple[str, Record]]:
    import datasets  # imported here, because it takes two seconds and only hub sources use it
    import pyarrow

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error below contains its messages
    datasets.disable_progress_bars()
    try:
        for number, record in enumerate(datasets.load_dataset(builder, **options)):
            yield f"{config.path} row {number}", _columns(record)
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, OSError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{config.path} cannot be read: {lines[0]}") from error


def _columns(record: Record) -> Record:
    """Return an Arrow row without the keys that are null in the objects inside its columns.

    Arrow fits one schema to all rows, so each object gains, as nulls, the keys of the same object in other rows. They
    cannot be told apart from nulls that the author wrote.
    """
    return {key: _without_nulls(value) for key, value in record.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _documents(records: Iterable[tuple[str, Record]], config: SourceConfig, errors: list[str]) -> Iterator[Document]:
    """Yield the record's documents; the errors of those that `config.unreadable` drops are added to `errors`."""
    format = format_named(config.format)
    for where, record in records:
        try:
            yield document_of(record, column=config.column, format=format, where=where, ignore=config.ignore)
        except DataError as error:
            if config.unreadable is Unreadable.refuse:
                raise
            errors.append(str(error))


def _distinct(documents: Iterable[Document], *, name: str) -> list[Document]:
    """Return the documents that contain text, each text once; log the number of dropped documents."""
    seen: set[bytes] = set()
    unique = []
    num_empty = num_identical = 0
    for document in documents:
        if not any(piece.text.strip() for piece in document.pieces if not piece.is_special):
            num_empty += 1
            continue
        identity = hashlib.blake2b(document.text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if identity in seen:
            num_identical += 1
            continue
        seen.add(identity)
        unique.append(document)
    for number, what in [(num_empty, "empty"), (num_identical, "identical")]:
        if number:
            _log.info("data.sources.%s: %d %s documents dropped", name, number, what)
    return unique


def _up_to(documents: list[Document], max_characters: int) -> list[Document]:
    """Return whole documents up to the limit, chosen by hash so that they are spread over the source."""
    chosen: set[int] = set()
    num_characters = 0
    for index in sorted(range(len(documents)), key=lambda index: key_hash(documents[index].key, choice=Choice.keep)):
        length = len(documents[index].text)
        if num_characters + length <= max_characters:
            num_characters += length
            chosen.add(index)
    return [document for index, document in enumerate(documents) if index in chosen]


_READERS: dict[SourceKind, Reader] = {
    SourceKind.stdlib_code: _from_stdlib(stdlib_code),
    SourceKind.stdlib_english: _from_stdlib(stdlib_english),
    SourceKind.maths: _maths,
    SourceKind.hub: _hub,
    SourceKind.jsonl: _jsonl,
    SourceKind.parquet: _parquet,
    SourceKind.text: _text,
}
