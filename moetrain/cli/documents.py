"""Pretraining and SFT: a run's sections into `train.stages`. Imported once the input is checked: it brings torch in."""

from moetrain.cli.stage import INTERRUPTED, stage_folder, stage_metrics
from moetrain.cli.weights import read_weights
from moetrain.config import ReadingRun
from moetrain.data.config import DataConfig, SourceKind
from moetrain.data.packing import TokenizedDocument
from moetrain.data.tokenizer import Tokenizer
from moetrain.tasks import registry
from moetrain.tasks.config import TaskConfig
from moetrain.tasks.dialogues import dialogue_texts, dialogues
from moetrain.train.interrupt import Status
from moetrain.train.stages import Dialogues, Sections, train_stage


def train(run: ReadingRun) -> int:
    """Run a stage that learns from documents; return its exit code."""
    family = registry.build(run.task, run.run.seed)
    most = max(dialogue_counts(run.data).values(), default=0)
    with stage_folder(run) as folder, stage_metrics(run) as metrics:
        status = train_stage(
            Sections(
                model=run.model,
                data=run.data,
                optim=run.optim,
                train=run.train,
                parallel=run.parallel,
                quant=run.quant,
                seed=run.run.seed,
            ),
            folder=folder,
            metrics=metrics,
            origin=read_weights(run.init_from) if run.init_from is not None else None,
            dialogues=dialogues_of(run.data, run.task, seed=run.run.seed),
            dialogue_texts=dialogue_texts(family, count=most),
        )
    return INTERRUPTED if status is Status.interrupted else 0


def dialogue_counts(data: DataConfig) -> dict[str, int]:
    """Return how many dialogues each source of that kind has."""
    return {name: source.num_documents for name, source in data.sources.items() if source.kind is SourceKind.dialogues}


def dialogues_of(data: DataConfig, task: TaskConfig, *, seed: int) -> Dialogues:
    """Return a function that makes the documents of the sources of kind dialogues, given a tokenizer."""
    family = registry.build(task, seed)

    def make(tokenizer: Tokenizer) -> dict[str, list[TokenizedDocument]]:
        return {
            name: list(dialogues(family, tokenizer, count=count, source=name, declare_tools=task.declare_tools))
            for name, count in dialogue_counts(data).items()
        }

    return make
