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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from moetrain.chat.template import ChatTemplate
from moetrain.data.config import FOREIGN_KINDS, SourceConfig, SourceKind, Unreadable
from moetrain.data.files import json_records, text_lines
from moetrain.data.formats import Document, Record, document_of, format_named, text_document, without_nulls
from moetrain.data.hub import hub_records
from moetrain.data.maths import maths_problems
from moetrain.data.stdlib import stdlib_code, stdlib_english
from moetrain.errors import ConfigError, DataError
from moetrain.files import user_path

_log = logging.getLogger(__name__)

Reader = Callable[[SourceConfig, list[str]], Iterator[Document]]
"""Reads a source; adds the errors of dropped records to the list."""

_ENDINGS = {
    SourceKind.jsonl: (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst"),
    SourceKind.parquet: (".parquet",),
    SourceKind.text: (".txt", ".md", ".rst", ".py", ".txt.gz", ".txt.zst"),
    SourceKind.megatron: (".idx",),
    SourceKind.datatrove: (".ds",),
}
"""Endings of the files that are read from a folder, by kind."""
_PREPARE_FIRST = "run moetrain prepare on it, which copies nothing, and read its folder with kind=prepared"
_ROWS_PER_BATCH = 256
"""Rows of a parquet file that are in memory at a time."""
_MIN_TEXT = 4000
"""Characters after which a text file is cut at the next blank line."""
_MATHS_SEED = 0
"""Fixed, because the run's seed changes the order of a source's documents and not their content."""


def read_documents(config: SourceConfig, *, name: str, unreadable: list[str] | None = None) -> list[Document]:
    """Return the documents of one source, each text once, up to `max_characters`.

    unreadable: gets the error of each record that `config.unreadable` drops.

    Raises DataError that names the file and line, the path or the column; or the source, when it is empty.
    """
    return read_source(config, name=name, unreadable=unreadable).documents


@dataclass(frozen=True, kw_only=True)
class SourceDocuments:
    """The documents of a source. num_empty: those without text. num_identical: those whose text an earlier one has."""

    documents: list[Document]
    num_empty: int
    num_identical: int


def read_source(config: SourceConfig, *, name: str, unreadable: list[str] | None = None) -> SourceDocuments:
    """Return what `read_documents` returns, and how many documents were dropped."""
    errors: list[str] = [] if unreadable is None else unreadable
    log_files_left_out(config, name=name)
    found = _distinct(all_documents(config, errors=errors), name=name)
    if errors:
        _log.warning("data.sources.%s: %d unreadable records dropped; the first is %s", name, len(errors), errors[0])
    if config.max_characters is not None:
        found = replace(found, documents=_up_to(found.documents, config.max_characters))
    if not found.documents:
        place = f" in {config.path}" if config.path else ""
        cap = f" within max_characters={config.max_characters}" if config.max_characters is not None else ""
        raise DataError(f"data.sources.{name} has no documents{place}{cap}: give a source that contains text")
    return found


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
    path = user_path(config.path)
    if path.is_dir():
        endings = _ENDINGS[config.kind]
        files = [item for item in _files_in(path) if item.name.endswith(endings)]
        if not files:
            raise DataError(f"{path} holds no file that ends in {' or '.join(endings)}")
        return files
    if path.is_file():
        return [path]
    index = path.with_name(f"{path.name}.idx")  # Megatron names a data set without the ending
    if config.kind is SourceKind.megatron and index.is_file():
        return [index]
    files = sorted(Path(item) for item in glob.glob(str(path), recursive=True) if Path(item).is_file())
    if not files:
        wrong = "is no regular file" if path.exists() else "does not exist"
        raise DataError(f"{path} {wrong}: give a file, a glob or a folder of {config.kind} files")
    return files


def files_left_out(config: SourceConfig) -> dict[str, int]:
    """Return how many files of the folder `path` are not read, by their ending; nothing if it is no folder."""
    path = user_path(config.path or "")
    if config.kind not in _ENDINGS or config.kind in FOREIGN_KINDS or config.path is None or not path.is_dir():
        return {}
    others = [item for item in _files_in(path) if not item.name.endswith(_ENDINGS[config.kind])]
    return dict(Counter(item.suffix or item.name for item in others).most_common())


def log_files_left_out(config: SourceConfig, *, name: str) -> None:
    """Log how many files of a folder are not read. name: that of the source."""
    if others := files_left_out(config):
        listed = ", ".join(f"{count} x {ending}" for ending, count in others.items())
        _log.warning("data.sources.%s: %s has files that are not read: %s", name, config.path, listed)


def _files_in(folder: Path) -> list[Path]:
    """Return the files in a folder and its folders, sorted, without hidden ones. Links are followed.

    Raises DataError for a link that leads nowhere, and for a folder that cannot be read.
    """
    return sorted(_files_below(folder, above=frozenset()))


def _files_below(folder: Path, *, above: frozenset[Path]) -> Iterator[Path]:
    """Yield the files below a folder. above: folders that it is in, to which a link does not return."""
    try:
        place, items = folder.resolve(), [item for item in folder.iterdir() if not item.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from error
    for item in items if place not in above else ():
        if item.is_dir():
            yield from _files_below(item, above=above | {place})
        elif item.is_file():
            yield item
        elif item.is_symlink():
            raise DataError(f"{item} is a link to a file that does not exist: remove the link, or restore the file")


def _from_stdlib(texts: Callable[[], dict[str, str]]) -> Reader:
    def read(config: SourceConfig, errors: list[str]) -> Iterator[Document]:
        return (text_document(text, key=f"stdlib:{path}") for path, text in texts().items())

    return read


def _maths(config: SourceConfig, errors: list[str]) -> Iterator[Document]:
    texts = maths_problems(seed=_MATHS_SEED, num_documents=config.num_documents)
    return (text_document(text) for text in texts)


def _jsonl(config: SourceConfig, errors: list[str]) -> Iterator[Document]:
    broken = errors if config.unreadable is Unreadable.drop else None
    records = [record for path in local_files(config) for record in json_records(path, errors=broken)]
    return documents_of(records, config, errors=errors)


def _text(config: SourceConfig, errors: list[str]) -> Iterator[Document]:
    broken = errors if config.unreadable is Unreadable.drop else None
    for path in local_files(config):
        yield from text_documents(path, errors=broken)


def text_documents(
    path: Path, *, max_characters: int | None = None, errors: list[str] | None = None
) -> Iterator[Document]:
    """Yield the documents of a text file: it is cut after blank lines, where a document has 4,000 characters or more.

    The file is read line by line. max_characters: a document is cut there, whether or not a line is blank.
    errors: see `text_lines`.
    """
    lines: list[str] = []
    length = 0
    is_blank = False
    for line in text_lines(path, errors=errors):
        was_blank, is_blank = is_blank, line.endswith("\n") and line.isspace()
        is_too_long = max_characters is not None and length >= max_characters
        if (was_blank and not is_blank and length >= _MIN_TEXT) or is_too_long:
            yield text_document("".join(lines))
            lines, length = [], 0
        lines.append(line)
        length += len(line)
    if (text := "".join(lines)).strip():
        yield text_document(text)


def all_documents(config: SourceConfig, *, errors: list[str]) -> Iterator[Document]:
    """Yield the documents of a source as they are read, repeated and empty ones too.

    errors: gets the error of each record that `config.unreadable` drops. Raises ConfigError for tokens that only
    `moetrain prepare` reads.
    """
    if config.kind in FOREIGN_KINDS:
        raise ConfigError(f"{config.path} is of kind {config.kind}, which training does not read: {_PREPARE_FIRST}")
    return _READERS[config.kind](config, errors)


def parquet_groups(path: Path) -> list[int]:
    """Return the bytes of each row group of a parquet file. Raises DataError that names the file."""
    with _parquet_file(path) as file:
        groups = range(file.num_row_groups)
        return [int(file.metadata.row_group(group).total_byte_size) for group in groups]


@contextmanager
def _parquet_file(path: Path) -> Iterator[Any]:
    import pyarrow  # imported here, because only parquet sources use it
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{path} cannot be read: {lines[0]}") from error


def _parquet(config: SourceConfig, errors: list[str]) -> Iterator[Document]:
    broken = errors if config.unreadable is Unreadable.drop else None
    records = (record for path in local_files(config) for record in parquet_records(path, errors=broken))
    return documents_of(records, config, errors=errors)


def parquet_records(
    path: Path, *, row_groups: range | None = None, column: str | None = None, errors: list[str] | None = None
) -> Iterator[tuple[str, Record]]:
    """Yield (place, record) of each row, or of the rows in `row_groups`. Raises DataError that names the file.

    column: the only column that is read, if the file has it. errors: gets the error of each row whose text is not
    UTF-8, which is left out; None raises it.
    """
    with _parquet_file(path) as file:
        columns = [column] if column in file.schema_arrow.names else None
        groups = range(file.num_row_groups) if row_groups is None else row_groups
        number = sum(file.metadata.row_group(group).num_rows for group in range(groups.start))
        # Small batches, because rows may be long.
        for batch in file.iter_batches(_ROWS_PER_BATCH, row_groups=list(groups), columns=columns):
            for record in _rows(batch, errors, path=path, number=number):
                if record is not None:
                    yield f"{path} row {number}", without_nulls(record)
                number += 1


def _rows(batch: Any, errors: list[str] | None, *, path: Path, number: int) -> Iterator[Record | None]:
    """Yield the records of a batch whose first row is `number`; None for one that is dropped."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # pyarrow does not name the row
        for row in range(batch.num_rows):
            try:
                yield batch.slice(row, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                text = f"{path} row {number + row} has text that is not UTF-8: {error.reason}"
                if errors is None:
                    raise DataError(text) from error
                errors.append(text)
                yield None


def _hub(config: SourceConfig, errors: list[str]) -> Iterator[Document]:
    num_characters = 0
    for document in documents_of(hub_records(config), config, errors=errors):
        num_characters += len(document.text)
        if config.max_characters is not None and num_characters > config.max_characters:
            return
        yield document


def documents_of(
    records: Iterable[tuple[object, Record]], config: SourceConfig, *, errors: list[str]
) -> Iterator[Document]:
    """Yield the document of each (place, record), in the source's format. A DataError begins with the place.

    errors: gets the error of each record that `config.unreadable` drops.
    """
    format = format_named(config.format)
    for where, record in records:
        try:
            yield document_of(record, column=config.column, format=format, where=where, ignore=config.ignore)
        except DataError as error:
            if config.unreadable is Unreadable.refuse:
                raise
            errors.append(str(error))


def renderable(
    documents: Iterable[Document], config: SourceConfig, *, template: ChatTemplate | None, errors: list[str]
) -> Iterator[Document]:
    """Yield the documents without the conversations that a chat template cannot render, where these are dropped.

    errors: gets the error of each document that `config.unreadable` drops.
    """
    for document in documents:
        if config.unreadable is Unreadable.drop and template is not None and document.chat is not None:
            try:
                document.rendered(template)
            except DataError as error:
                errors.append(str(error))
                continue
        yield document


def _distinct(documents: Iterable[Document], *, name: str) -> SourceDocuments:
    """Return the documents that contain text, each text once; log how many others there are."""
    seen: set[bytes] = set()
    unique = []
    num_empty = num_identical = 0
    for document in documents:
        if not document.has_text:
            num_empty += 1
            continue
        identity = hashlib.blake2b(document.identity.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if identity in seen:
            num_identical += 1
            continue
        seen.add(identity)
        unique.append(document)
    for number, what in [(num_empty, "empty"), (num_identical, "identical")]:
        if number:
            _log.info("data.sources.%s: %d %s documents dropped", name, number, what)
    return SourceDocuments(documents=unique, num_empty=num_empty, num_identical=num_identical)


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
