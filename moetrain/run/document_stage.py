"""Pretraining and SFT: passes a run's config to `train.stages`. Loads torch, so import it after checking the input."""

from collections.abc import Iterable
from pathlib import Path

from moetrain.chat.registry import template_named
from moetrain.checkpoint.origin import TOKENIZER
from moetrain.commands.training import DocumentRun
from moetrain.data.build import Data, build_data
from moetrain.data.config import DataConfig, SourceKind
from moetrain.data.packing import TokenizedDocument
from moetrain.data.tokenizer import Tokenizer
from moetrain.parallel.topology import Topology, setup
from moetrain.run.begun import as_begun
from moetrain.run.stage import INTERRUPTED, stage_folder, stage_metrics
from moetrain.run.weights import training_weights
from moetrain.tasks import registry
from moetrain.tasks.config import TaskConfig
from moetrain.tasks.dialogues import dialogue_texts, dialogues
from moetrain.train.interrupt import Status
from moetrain.train.precision import resolve_precision
from moetrain.train.stage_tokenizer import fitted_model, stage_tokenizer
from moetrain.train.stages import Dialogues, Sections, main_rank_first, mixes_of, train_stage


def train(run: DocumentRun) -> int:
    """Run a stage that trains on documents; return its exit code."""
    run = as_begun(run)
    with stage_folder(run) as folder, stage_metrics(run) as metrics:
        status = train_stage(
            sections_of(run),
            folder=folder,
            metrics=metrics,
            origin=training_weights(run) if run.continue_from or run.init_from else None,
            dialogues=dialogues_of(run.data, run.task, seed=run.run.seed),
            dialogue_texts=_texts(run),
        )
    return INTERRUPTED if status is Status.interrupted else 0


def sections_of(run: DocumentRun) -> Sections:
    """Return the config sections that a training stage uses."""
    return Sections(
        model=run.model,
        data=run.data,
        optim=run.optim,
        train=run.train,
        parallel=run.parallel,
        quant=run.quant,
        seed=run.run.seed,
    )


def document_data(run: DocumentRun, folder: Path) -> tuple[Sections, Data, Topology]:
    """Return (sections, data, topology) of a run, for training outside of a stage. Writes the tokenizer to `folder`."""
    topology = setup(run.parallel)
    sections = sections_of(run)
    precision = resolve_precision(sections.train, folder=folder, topology=topology)
    sections.train, sections.library = precision.train, precision.library
    tokenizer = main_rank_first(
        topology,
        lambda: stage_tokenizer(
            run.data, folder, num_rows=run.model.vocab_size, origin=None, dialogue_texts=_texts(run)
        ),
    )
    sections.model = fitted_model(sections.model, run.data, tokenizer=tokenizer)
    data = build_data(
        run.data,
        run.run.seed,
        tokenizer_folder=folder / TOKENIZER,
        dialogues=dialogues_of(run.data, run.task, seed=run.run.seed)(tokenizer),
        mixes=mixes_of(sections.data, sections.train),
    )
    return sections, data, topology


def _texts(run: DocumentRun) -> Iterable[str]:
    """Return the rendered dialogues on which a new tokenizer of this run is trained, besides the documents."""
    most = max(dialogue_counts(run.data).values(), default=0)
    return dialogue_texts(
        registry.build(run.task, run.run.seed),
        template=template_named(run.data.tokenizer.template),
        count=most,
        seed=run.run.seed,
        policy=run.task.context,
    )


def dialogue_counts(data: DataConfig) -> dict[str, int]:
    """Return the number of dialogues per source of kind dialogues."""
    return {name: source.num_documents for name, source in data.sources.items() if source.kind is SourceKind.dialogues}


def dialogues_of(data: DataConfig, task: TaskConfig, *, seed: int) -> Dialogues:
    """Return a function that takes a tokenizer and returns the documents of the sources of kind dialogues by source."""
    family = registry.build(task, seed)

    def make(tokenizer: Tokenizer) -> dict[str, list[TokenizedDocument]]:
        return {
            name: list(
                dialogues(
                    family,
                    tokenizer,
                    count=count,
                    seed=seed,
                    source=name,
                    declare_tools=task.declare_tools,
                    policy=task.context,
                )
            )
            for name, count in dialogue_counts(data).items()
        }

    return make
