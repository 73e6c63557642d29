"""Pretraining and SFT: from the sections of a config to a trained folder. They differ only in data and settings.

A stage's folder gets `tokenizer/`, `checkpoints/` and, at the end, `summary.json`. Dialogues, metrics and evaluation
belong to packages above this one and are passed in as functions.
"""

import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moetrain.checkpoint.origin import TOKENIZER, Origin, check_fit, continue_state, shared_digest, start_from
from moetrain.checkpoint.shape import stored_shape
from moetrain.data.batch import TokenBatch
from moetrain.data.bigram import bigram_baseline
from moetrain.data.build import Data, build_data
from moetrain.data.config import DataConfig
from moetrain.data.loader import Mix
from moetrain.data.packing import TokenizedDocument
from moetrain.data.prefetch import Prefetch
from moetrain.data.store.rows import plan_sources
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import MoetrainError
from moetrain.files import user_path, write_json
from moetrain.kernels.build import Library
from moetrain.log import Metrics
from moetrain.model.attention import MaxLogits
from moetrain.model.config import ModelConfig
from moetrain.model.flops import flops_per_token, num_parameters
from moetrain.optim.config import OptimConfig
from moetrain.parallel.config import ParallelConfig
from moetrain.parallel.engine import build_engine
from moetrain.parallel.protocol import Engine
from moetrain.parallel.topology import Topology, setup
from moetrain.quant.config import QuantConfig
from moetrain.stage_files import MACHINE, SUMMARY
from moetrain.train.config import DocumentTrainConfig
from moetrain.train.continuation import ROWS_READ, StartPoint, check_same_sources, start_point_of
from moetrain.train.document_stage import DocumentStage, document_training
from moetrain.train.identity import identity_of
from moetrain.train.interrupt import Status
from moetrain.train.loop import Outcome, run_training
from moetrain.train.loss import ObjectiveFor, language_model_objective
from moetrain.train.peak import total_peak
from moetrain.train.precision import DTYPES, resolve_precision
from moetrain.train.rows import read_rank_rows
from moetrain.train.stage_tokenizer import fitted_model, stage_tokenizer
from moetrain.train.validate import validate

_log = logging.getLogger(__name__)


Dialogues = Callable[[Tokenizer], Mapping[str, Iterable[TokenizedDocument]]]
"""Returns the documents of each source of kind dialogues, given the tokenizer."""


@dataclass(kw_only=True)
class Sections:
    """The config sections of a training stage. library: the native kernels, set once they are chosen."""

    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    train: DocumentTrainConfig
    parallel: ParallelConfig
    quant: QuantConfig
    seed: int
    library: Library | None = None


def train_stage(
    sections: Sections,
    *,
    folder: Path,
    metrics: Metrics,
    origin: Origin | None = None,
    dialogues: Dialogues | None = None,
    dialogue_texts: Iterable[str] = (),
) -> Status:
    """Run pretraining or SFT in `folder`, from its last checkpoint if there is one; write `summary.json` when finished.

    Collective. origin: weights to start from, or the checkpoint to continue if `train.continue_as` is set
    (`checkpoint.origin.read_origin`). dialogue_texts: rendered dialogues to include when a tokenizer is trained.
    Raises the errors of data, checkpoints and layout. An interrupted stage resumes when it is run again.
    """
    if origin is not None:
        check_fit(origin, sections.model)  # before preparing the data, which takes longest
    start_point = document_start_point(sections, origin)
    topology = setup(sections.parallel)

    def prepared_tokenizer() -> Tokenizer:
        if topology.is_main:
            _forget_tokenizer(folder, sections.data)
        tokenizer = stage_tokenizer(
            sections.data, folder, num_rows=sections.model.vocab_size, origin=origin, dialogue_texts=dialogue_texts
        )
        if topology.is_main:
            plan_sources(sections.data, tokenizer)
        return tokenizer

    tokenizer = main_rank_first(topology, prepared_tokenizer)
    model = fitted_model(sections.model, sections.data, tokenizer=tokenizer)
    data = build_data(
        sections.data,
        sections.seed,
        tokenizer_folder=folder / TOKENIZER,
        dialogues=dialogues(tokenizer) if dialogues else None,
        mixes=mixes_of(sections.data, sections.train, start_point=start_point),
        taken=_rows_taken(start_point),
    )
    precision = resolve_precision(sections.train, folder=folder, topology=topology)
    sections = replace(sections, model=model, train=precision.train, library=precision.library)
    engine = engine_of(sections)
    if origin is not None:
        start = start_from if sections.train.continue_as is None else continue_state
        start(engine, origin, model=sections.model)
    stage = document_stage_of(
        sections,
        engine=engine,
        data=data,
        peak_flops=_peak_flops(sections, folder=folder, topology=topology),
        origin=origin,
        start_point=start_point,
    )
    outcome = run_training(document_training(stage, sections.train), sections.train, folder=folder, metrics=metrics)
    if outcome.status is Status.finished and topology.is_main:
        write_json(folder / SUMMARY, _summary(sections, data=data, outcome=outcome, stage=stage, folder=folder))
    topology.barrier()
    return outcome.status


def document_start_point(sections: Sections, origin: Origin | None) -> StartPoint:
    """Return where a stage with these sections begins; raises `CheckpointError` if it cannot continue `origin`."""
    start_point = start_point_of(
        origin, counted=ROWS_READ, optim=sections.optim, train=sections.train, seed=sections.seed
    )
    if start_point.path is not None and origin is not None:
        check_same_sources(origin, asdict(sections.data))
    return start_point


def _rows_taken(start_point: StartPoint) -> dict[str, int]:
    """Return the rows read per source before the added steps; empty unless the config describes only added steps."""
    sources = start_point.data["sources"] if start_point.is_part else {}
    return {name: counts["rows_taken"] for name, counts in sources.items()}


def rows_before(step: int, train: DocumentTrainConfig, *, start_point: StartPoint) -> int:
    """Return the rows of all steps of the run before step `step`."""
    read: int = start_point.data[ROWS_READ] if start_point.is_part else 0
    return read + train.rows_before(step - start_point.first_step)


def mixes_of(data: DataConfig, train: DocumentTrainConfig, *, start_point: StartPoint | None = None) -> list[Mix]:
    """Return the data mixes of a config, each with the index of its first row in the run."""
    start_point = start_point or StartPoint()
    first_steps = [0, *(change.first_step(train.steps) for change in data.mix)]
    return [
        Mix(first_row=rows_before(start_point.first_step + step, train, start_point=start_point), weights=weights)
        for step, weights in zip(first_steps, data.mix_weights(), strict=True)
    ]


def engine_of(sections: Sections) -> Engine:
    """Return the engine of a run, initialised from its seed. Collective; raises ConfigError if no layout fits.

    The dtype and kernels must have been chosen (`train.precision.resolve_precision`).
    """
    return build_engine(
        sections.model,
        sections.parallel,
        optim_config=sections.optim,
        quant_config=sections.quant,
        compute_dtype=DTYPES[sections.train.compute_dtype],
        seed=sections.seed,
        library=sections.library,
    )


def main_rank_first(topology: Topology, make: Callable[[], Tokenizer]) -> Tokenizer:
    """Return the result of `make`, run on the main rank before all others; its error is raised on every rank.

    The other ranks wait without a timeout, because reading a corpus and training a tokenizer may take long.
    """
    made: Tokenizer | None = None
    failure: MoetrainError | None = None
    if topology.is_main:
        try:
            made = make()
        except MoetrainError as error:
            failure = error
    topology.wait_for_main()
    failure = topology.broadcast_object(failure)
    if failure is not None:
        raise failure
    return made if made is not None else make()


def _peak_flops(sections: Sections, *, folder: Path, topology: Topology) -> float:
    dtype = DTYPES[sections.train.compute_dtype]
    return total_peak(folder / MACHINE, dtype=dtype, topology=topology, library=sections.library)


def _forget_tokenizer(folder: Path, config: DataConfig) -> None:
    """Remove the tokenizer of an earlier start that wrote no checkpoint: its texts may have been others."""
    own, given = folder / TOKENIZER, config.tokenizer.path
    is_given = given is not None and user_path(given).resolve() == own.resolve()
    if not is_given and stored_shape(str(folder)) is None:
        shutil.rmtree(own, ignore_errors=True)


def document_stage_of(
    sections: Sections,
    *,
    engine: Engine,
    data: Data,
    peak_flops: float,
    origin: Origin | None = None,
    start_point: StartPoint | None = None,
) -> DocumentStage:
    """Return what the steps of a stage with these sections need, for `take_document_step`. Collective.

    peak_flops: see `DocumentStage`; inf leaves out the utilisation. start_point: None is a new run.
    """
    start_point = start_point or StartPoint()
    train, optim = sections.train, sections.optim
    topology = engine.topology
    orders = {"order": versions} if (versions := data.order_versions()) else {}

    def measure() -> dict[str, float]:
        return validate(engine, data.validation, rows_per_micro_batch=train.rows_per_micro_batch)

    def first_row(step: int) -> int:
        return rows_before(step, train, start_point=start_point)

    def rows_of(step: int) -> range:
        return range(first_row(step), first_row(step + 1))

    def batch_at(step: int) -> TokenBatch:
        return read_rank_rows(
            data.loader.rows_between, rows_of(step), rank=topology.rank, world_size=topology.world_size
        )

    return DocumentStage(
        engine=engine,
        objective_at=_objectives(sections, start_point=start_point),
        batch_at=Prefetch(batch_at) if orders else batch_at,
        num_rows_at=lambda step: len(rows_of(step)),
        learning_rate=lambda step: start_point.rate(step, optim=optim, steps=train.steps),
        mix_at=lambda step: data.loader.mix_at(first_row(step)),
        position=lambda step: _position(data, rows_read=first_row(step)),
        start_point=start_point,
        balance=sections.model.balance,
        validate=measure,
        initial_metrics=data.metrics(),
        identity=identity_of(
            model=sections.model,
            quant=sections.quant,
            optim=optim,
            train=train,
            seed=sections.seed,
            origin=shared_digest(origin, topology) if origin else None,
            others={"data": asdict(sections.data), "digests": data.digests, **orders},
        ),
        flops_per_token=flops_per_token(sections.model, sections.data.seq_len),
        peak_flops=peak_flops,
        qk_clip=optim.qk_clip,
    )


def _objectives(sections: Sections, *, start_point: StartPoint) -> Callable[[int], ObjectiveFor]:
    """Return the objective by step of the run (from 0)."""
    train, balance = sections.train, sections.model.balance
    max_logits = MaxLogits.needed(sections.optim.qk_clip)

    def objective_at(step: int) -> ObjectiveFor:
        weight = train.mtp.at(step - start_point.first_step, steps=train.steps)
        return lambda counts: language_model_objective(
            counts, balance=balance, max_logits=max_logits, mtp_weight=weight
        )

    return objective_at


def _position(data: Data, *, rows_read: int) -> dict[str, Any]:
    """Return the data position that a checkpoint stores: rows read per source, and the size of each source."""
    sources = {
        name: {"rows_taken": taken, "rows": data.training[name].num_rows, "sha256": data.digests[name]}
        for name, taken in data.loader.rows_taken(rows_read).items()
    }
    for name, version in data.order_versions().items():
        if name in sources:
            sources[name]["order"] = version
    return {ROWS_READ: rows_read, "sources": sources, "tokenizer": data.tokenizer.digest}


def _summary(sections: Sections, *, data: Data, outcome: Outcome, stage: DocumentStage, folder: Path) -> dict[str, Any]:
    """Return the content of `summary.json`: reproducible figures, and times under their own key."""
    bigram = bigram_baseline(data.in_memory(), data.validation, vocab_size=data.tokenizer.vocab_size)
    sources = {
        name: {
            "nats_per_character": outcome.validation[f"validation/{name}"],
            "bigram_nats_per_character": bigram.get(name),
            "characters": rows.num_characters,
            "targets": rows.batch.num_targets,
        }
        for name, rows in data.validation.items()
    }
    rows_read = stage.position(outcome.step)[ROWS_READ]
    seconds = outcome.counters.seconds
    return {
        "stage": folder.name,
        "steps": outcome.step,
        "compute_dtype": sections.train.compute_dtype,
        "kernels": sections.train.kernels,
        **outcome.counters.totals,
        **stage.start_point.record(),
        "rows": rows_read,
        "epochs": data.loader.epochs(rows_read),
        "mixes": data.loader.mix_rows(rows_read),
        "vocabulary": {"tokens": data.tokenizer.vocab_size, "rows": sections.model.vocab_size},
        "parameters": asdict(num_parameters(sections.model)),
        "validation": sources,
        "figures": {name: value for name, value in outcome.validation.items() if not name.startswith("validation/")},
        "digests": data.digests,
        "documents": {name: asdict(counts) for name, counts in data.counts.items()},
        "checkpoint": str(outcome.checkpoint.relative_to(folder)),
        "time": {"seconds": seconds, "tokens_per_s": outcome.counters.totals["tokens"] / seconds if seconds else None},
    }
