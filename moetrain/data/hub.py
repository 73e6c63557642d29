"""Reads records of data sets of the Hugging Face hub, through `datasets`."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrain.data.config import SourceConfig
from moetrain.data.formats import Record, without_nulls
from moetrain.errors import DataError

_REVISION = re.compile(r"@([0-9a-f]{40})$")


@dataclass(frozen=True, kw_only=True)
class HubPart:
    """A part of a data set, counted from 0, and the revision that it is read from.

    For a local folder the revision is None, and local_bytes are the bytes of all its data files.
    """

    number: int
    num_parts: int
    revision: str | None = None
    local_bytes: int | None = None


def hub_records(config: SourceConfig) -> Iterator[tuple[str, Record]]:
    """Yield (place, record) of each row; streamed if `max_characters` is set, else downloaded first.

    Raises DataError that names the data set.
    """
    with _loading(config):
        builder = _builder(config)
        if config.max_characters is not None:
            rows = builder.as_streaming_dataset(config.split)
        else:
            builder.download_and_prepare()
            rows = builder.as_dataset(config.split)
    yield from _records(rows, config)


def hub_parts(config: SourceConfig) -> list[HubPart]:
    """Return the parts in which the present revision can be streamed. Raises DataError that names the data set."""
    with _loading(config):
        builder = _builder(config)
        found = _REVISION.search(builder.base_path or "")
        num_parts = int(builder.as_streaming_dataset(config.split).num_shards)
        paths = [Path(name) for names in (builder.config.data_files or {}).values() for name in names]
        local_bytes = sum(path.stat().st_size for path in paths if path.is_file()) or None
    revision = found[1] if found else None
    return [
        HubPart(number=number, num_parts=num_parts, revision=revision, local_bytes=local_bytes)
        for number in range(num_parts)
    ]


def part_records(config: SourceConfig, part: HubPart) -> Iterator[tuple[str, Record]]:
    """Stream (place, record) of each row of a part. Raises DataError that names the data set."""
    with _loading(config):
        whole = _builder(config, revision=part.revision).as_streaming_dataset(config.split)
        rows = whole.shard(num_shards=part.num_parts, index=part.number)
    yield from _records(rows, config)


@contextmanager
def _loading(config: SourceConfig) -> Iterator[None]:
    import datasets  # imported here, because it takes two seconds and only hub sources use it
    import pyarrow

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error below contains its messages
    datasets.disable_progress_bars()
    try:
        yield
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, OSError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{config.path} cannot be read: {lines[0]}") from error


def _builder(config: SourceConfig, *, revision: str | None = None) -> Any:
    """Return the data set's builder; a name is "owner/name", or "owner/name:configuration"."""
    import datasets

    assert config.path is not None  # SourceConfig checks it
    name, _, subset = config.path.partition(":")
    return datasets.load_dataset_builder(name, name=subset or None, revision=revision)


def _records(rows: Iterable[Record], config: SourceConfig) -> Iterator[tuple[str, Record]]:
    with _loading(config):
        for number, record in enumerate(rows):
            yield f"{config.path} row {number}", without_nulls(record)
