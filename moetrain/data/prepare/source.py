"""Prepares one source: shards on several processes, then what concerns all of its documents, then the index.

A stopped preparation resumes with the shards that are not done, or whose input changed. The result does not depend on
the number of processes or on stops. Does not import torch.
"""

import json
import logging
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from moetrain.data.config import FOREIGN_KINDS, DataConfig, SourceConfig
from moetrain.data.prepare.config import PrepareConfig
from moetrain.data.prepare.contamination import EvaluationTexts
from moetrain.data.prepare.finish import Origin, finish
from moetrain.data.prepare.foreign import write_foreign
from moetrain.data.prepare.inputs import Unit, shards_of, units_of
from moetrain.data.prepare.shard import Shard, read_result, write_shard
from moetrain.data.prepare.similar import Bands
from moetrain.data.sources import log_files_left_out
from moetrain.data.store.index import INDEX, TOKENIZER, WORK, Index, Part, check_sizes, read_index
from moetrain.data.store.plan import PlanRequest, plan_of
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import DataError
from moetrain.files import read_json_or_empty, sha256_of_json, to_json, write_json
from moetrain.log import progress
from moetrain.runtime import die_with_parent

_log = logging.getLogger(__name__)

REQUEST = "request.json"
"""File in the folder of a source with everything that its content depends on."""
_AGAIN = "give another run.name, or remove the folder to prepare it again"


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What the sources of a preparation share.

    tokenizer_folder: from which worker processes load the tokenizer. start_worker: called in each worker process.
    """

    data: DataConfig
    config: PrepareConfig
    tokenizer: Tokenizer
    tokenizer_folder: Path
    evaluation: EvaluationTexts
    start_worker: Callable[[], None]


def prepare_source(name: str, folder: Path, *, preparation: Preparation) -> Index:
    """Write the folder of a source, and its packing plan for rows of `data.seq_len`; return the index.

    A finished folder that was made of the same settings and files is left as it is. Raises DataError for input that
    cannot be read, for a folder of other settings or files, and when the folder cannot be written.
    """
    source = preparation.data.sources[name]
    try:
        units = units_of(source, shard_bytes=preparation.config.shard_bytes)
    except OSError as error:
        raise DataError(f"data.sources.{name}: {error.filename} cannot be read: {error.strerror}") from error
    try:
        if (folder / INDEX).is_file():
            _check_request(folder, _request(source, units, preparation=preparation))
            index = read_index(folder)
            check_sizes(folder, index)
            _log.info("data.sources.%s: %s is prepared already", name, folder)
            if changed := [unit.path for unit in units if unit.changed_after(folder / INDEX)]:
                _log.warning("%s was modified after that: if its content is another one, %s", changed[0], _AGAIN)
        else:
            index = _prepare(name, folder, units=units, preparation=preparation)
        _remove_work(folder, index)
        overlong = source.overlong or preparation.data.overlong
        for part in (Part.training, Part.held_out):
            plan_of(folder, index, request=PlanRequest(seq_len=preparation.data.seq_len, overlong=overlong, part=part))
        return index
    except OSError as error:
        raise DataError(f"data.sources.{name}: {folder} cannot be written: {error}") from error


def _prepare(name: str, folder: Path, *, units: list[Unit], preparation: Preparation) -> Index:
    source, config = preparation.data.sources[name], preparation.config
    log_files_left_out(source, name=name)
    if config.near_duplicates:
        Bands()  # raises an error before the work begins
    request = _request(source, units, preparation=preparation)
    shards = [
        Shard(
            number=number,
            folder=folder,
            name=name,
            source=source,
            units=of_shard,
            near_duplicates=config.near_duplicates,
            made_of=sha256_of_json({**request, "inputs": [asdict(unit) for unit in of_shard]}),
        )
        for number, of_shard in enumerate(_shards(source, units, shard_bytes=config.shard_bytes))
    ]
    (folder / WORK).mkdir(parents=True, exist_ok=True)
    for left_over in [*folder.glob(".*.tmp"), *(folder / WORK).glob(".*.tmp")]:  # of a process that was killed
        left_over.unlink()
    write_json(folder / REQUEST, request)
    preparation.tokenizer.save(folder / TOKENIZER)
    _write_shards(shards, preparation=preparation)
    origin = Origin(
        name=f"data.sources.{name}",
        tokenizer=preparation.tokenizer,
        source=request["source"],
        fraction=preparation.data.validation_fraction,
        inputs={"files": len({unit.path for unit in units}), "bytes": sum(unit.size for unit in units)},
    )
    return finish(folder, shards, origin=origin)


def _remove_work(folder: Path, index: Index) -> None:
    """Remove what only the preparation needed, and token files of an earlier attempt that had more shards."""
    known = {file.name for file in index.stored_files()}
    for left_over in [*folder.glob("tokens-*.bin"), *folder.glob("mask-*.bin")]:
        if left_over.name not in known:
            left_over.unlink()
    shutil.rmtree(folder / WORK, ignore_errors=True)


def _request(source: SourceConfig, units: Sequence[Unit], *, preparation: Preparation) -> dict[str, Any]:
    """Return everything that the content of a source's folder depends on, as it is read back from JSON."""
    request = {
        "source": {key: value for key, value in asdict(source).items() if key not in ("weight", "overlong")},
        "tokenizer": preparation.tokenizer.digest,
        "validation_fraction": preparation.data.validation_fraction,
        **{key: value for key, value in asdict(preparation.config).items() if key != "workers"},
        "evaluation texts": preparation.evaluation.digest,
        "inputs": [asdict(unit) for unit in units],
    }
    read_back: dict[str, Any] = json.loads(to_json(request))
    return read_back


def _shards(source: SourceConfig, units: list[Unit], *, shard_bytes: int) -> list[list[Unit]]:
    """Return the units of each shard; a token file of another program is a shard of its own."""
    is_foreign = source.kind in FOREIGN_KINDS
    return [[unit] for unit in units] if is_foreign else shards_of(units, shard_bytes=shard_bytes)


def _check_request(folder: Path, request: dict[str, Any]) -> None:
    """Raise DataError when the folder holds data of other settings or files."""
    before = read_json_or_empty(folder / REQUEST)
    for key, value in request.items():
        if before.get(key) == value:
            continue
        what = f"another {key}"
        if key == "inputs":
            earlier = {(unit["path"], unit["begin"]): unit for unit in before.get(key) or []}
            now = {(unit["path"], unit["begin"]): unit for unit in value}
            places = [place for place in {**earlier, **now} if earlier.get(place) != now.get(place)]
            what = "its files in another order"
            if places:
                path, named = places[0][0], places[0][0] or "the data set"
                is_new = path not in {other for other, _ in earlier}
                what = f"other files, without {named}" if is_new else f"another content of {named}"
        raise DataError(f"{folder} was prepared with {what}: {_AGAIN}")


def _write_shards(shards: Sequence[Shard], *, preparation: Preparation) -> None:
    left = [shard for shard in shards if not shard.is_done]
    workers = min(preparation.config.num_workers(), len(left))
    name = f"prepare {shards[0].name}" if shards else ""
    with progress(len(shards), name, completed=len(shards) - len(left)) as advance:
        if workers <= 1:
            for shard in left:
                _write(shard, tokenizer=preparation.tokenizer, evaluation=preparation.evaluation)
                advance(_note(shard))
            return
        with ProcessPoolExecutor(
            workers,
            mp_context=get_context("spawn"),
            initializer=_start_worker,
            initargs=(preparation.tokenizer_folder, preparation.evaluation, preparation.start_worker),
        ) as pool:
            futures = {pool.submit(_work, shard): shard for shard in left}
            try:
                for future in as_completed(futures):
                    future.result()
                    advance(_note(futures[future]))
            except BrokenProcessPool as error:
                raise DataError(
                    f"data.sources.{shards[0].name}: a worker process was killed, perhaps because memory was full: run "
                    "the command again to resume, with fewer prepare.workers if it happens again"
                ) from error
            except BaseException:
                _log.info("waiting for the shards that are being written")
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def _note(shard: Shard) -> str:
    result = read_result(shard)
    return f"{result.counts.num_documents:,} documents, {result.file.num_tokens:,} tokens"


_worker: tuple[Tokenizer, EvaluationTexts]
"""Tokenizer and evaluation texts of a worker process."""


def _start_worker(tokenizer_folder: Path, evaluation: EvaluationTexts, start: Callable[[], None]) -> None:
    global _worker
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the main process, which stops the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per worker
    start()
    _worker = (Tokenizer.load(tokenizer_folder), evaluation)


def _work(shard: Shard) -> None:
    tokenizer, evaluation = _worker
    _write(shard, tokenizer=tokenizer, evaluation=evaluation)


def _write(shard: Shard, *, tokenizer: Tokenizer, evaluation: EvaluationTexts) -> None:
    write = write_foreign if shard.source.kind in FOREIGN_KINDS else write_shard
    write(shard, tokenizer=tokenizer, evaluation=evaluation)
