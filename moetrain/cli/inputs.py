"""What a config names, checked before anything starts: folders and files, plugins, names, records, weights.

`check_inputs` looks at paths alone and is what every process does first. The rest reads more: names need the plugins,
records are read whole, weights bring torch in. `moetrain check` does all of it, and launchers call that before they
start ranks, so that a mistake in the input is one line and not one a rank.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from moetrain.cli.earlier import read_before
from moetrain.cli.plugins import load_plugins, plugin_spec
from moetrain.commands import VerifyExportsRun
from moetrain.config import EvalRun, ExportRun, GenerateRun, ReadingRun, RlRun, StageRun, TrainingRun
from moetrain.data.config import DataConfig, SourceKind
from moetrain.data.formats import format_named
from moetrain.data.sources import local_files, read_documents
from moetrain.errors import CheckpointError, ConfigError
from moetrain.runtime import num_ranks
from moetrain.tasks import registry

LOCAL_KINDS = (SourceKind.jsonl, SourceKind.parquet, SourceKind.text)
"""Kinds of sources that are files."""
_NEED_WEIGHTS: dict[type[StageRun], str] = {
    RlRun: "RL begins with weights that solve some tasks, give those of an SFT stage",
    ExportRun: "give the stage or checkpoint to export",
    EvalRun: "give the export to evaluate",
    GenerateRun: "give the folder of the weights",
    VerifyExportsRun: "give the export to verify",
}
"""What to give as init_from where it cannot be null."""


def check_inputs(run: StageRun, *, made: Sequence[Path] = (), world_size: int | None = None) -> None:
    """Raise the user's error when what the config names is not there; ranks and files come after this.

    made: folders that earlier stages will write. world_size: ranks that will start; None takes what the launcher says.
    """
    for field, value in _folders(run):
        if not value:
            raise ConfigError(f"{field} is empty: give a folder, or null")
        folder = Path(value).expanduser()
        if not folder.is_dir() and not any(folder.is_relative_to(parent) for parent in made):
            wrong = "that is a file" if folder.exists() else "there is no such folder"
            raise CheckpointError(f"{field} is {value}: {wrong}")
    for plugin in run.plugins:
        plugin_spec(plugin)
    if isinstance(run, TrainingRun):
        run.parallel.check_world_size(num_ranks() if world_size is None else world_size)
    for source in _data(run).sources.values():
        if source.kind in LOCAL_KINDS:
            local_files(source)


def check_names(run: StageRun) -> None:
    """Load the plugins, and raise the user's error where a task or a format is named that nobody registered."""
    load_plugins(run.plugins)
    for schema, needed in _NEED_WEIGHTS.items():
        if isinstance(run, schema) and run.init_from is None:
            raise ConfigError(f"init_from is null: {needed}")
    if isinstance(run, ReadingRun | RlRun | EvalRun):
        registry.build(run.task, run.run.seed)
    for source in _data(run).sources.values():
        format_named(source.format)


def check_records(run: StageRun) -> None:
    """Read every document of the sources that are files; `DataError` names the file and line that cannot be used."""
    for name, source in _data(run).sources.items():
        if source.kind in LOCAL_KINDS:
            read_documents(source, name=name)


def check_weights(run: StageRun) -> None:
    """Read what a stage that several ranks share starts from, and raise the user's error when it does not fit."""
    if run.init_from is None or not isinstance(run, TrainingRun | EvalRun):
        return
    # These bring torch in; most command lines name no weights.
    from moetrain.cli.weights import read_weights
    from moetrain.train.origin import check_fit

    origin = read_weights(run.init_from)
    if isinstance(run, TrainingRun):
        check_fit(origin, run.model)
        return
    for path in (run.eval.masters, run.eval.codes_before):
        if path is not None:
            read_weights(path)
    read_before(run)


def _folders(run: StageRun) -> Iterator[tuple[str, str]]:
    """Yield (field, folder) of what a config takes of others."""
    named = {"init_from": run.init_from}
    if isinstance(run, VerifyExportsRun):
        named["masters"] = run.masters
    if isinstance(run, EvalRun):
        of_eval = run.eval
        named |= {
            "eval.masters": of_eval.masters,
            "eval.before": of_eval.before,
            "eval.codes_before": of_eval.codes_before,
        }
    named["data.tokenizer.path"] = _data(run).tokenizer.path
    for field, value in named.items():
        if value is not None:
            yield field, value


def _data(run: StageRun) -> DataConfig:
    return run.data if isinstance(run, ReadingRun | EvalRun) else DataConfig()
