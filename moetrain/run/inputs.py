"""Checks everything that a config names before a stage starts: folders, files, plugins, names, records, weights.

`check_inputs` checks only paths and sizes, and every process calls it first. The other checks read more: `check_names`
imports the plugins, `check_records` reads all records, `check_prepared` all prepared tokens, `check_weights` loads
torch. `moetrain check` runs all of them. The launchers run it before they start ranks, without `check_prepared`, so
that a mistake is reported once instead of once per rank.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moetrain.chat.registry import AUTO, template_named
from moetrain.chat.template import ChatTemplate
from moetrain.commands.bench_generation import BenchDraftsRun
from moetrain.commands.data import DataRun, PrepareRun
from moetrain.commands.stage import StageRun, WeightsRun, check_length
from moetrain.commands.training import DocumentRun, RlRun, TrainingRun
from moetrain.commands.verify import (
    VerifyExportsRun,
)
from moetrain.commands.weights import ChatRun, EvalRun, ExportRun, GenerateRun, ServeRun, UpcycleRun
from moetrain.data.chat_tokenizer import load_tokenizer
from moetrain.data.config import FOREIGN_KINDS, DataConfig, SourceKind
from moetrain.data.formats import format_named
from moetrain.data.hold_out import hold_out_of
from moetrain.data.sources import local_files, read_documents, renderable
from moetrain.data.store.index import TOKENIZER, check_contents, check_sizes, prepared_folders, read_index
from moetrain.data.store.plan import check_plans
from moetrain.data.tokenizer import Tokenizer, holds_tokenizer
from moetrain.errors import CheckpointError, ConfigError, DataError
from moetrain.export.config import exported_quant
from moetrain.files import user_path
from moetrain.hf.consumers import check_consumers
from moetrain.rollout.making import make_task
from moetrain.run.chain import keeps_tokenizer, needs_chat, stage_template
from moetrain.run.earlier_evaluation import read_before
from moetrain.run.plugins import load_plugins, plugin_spec
from moetrain.runtime import available_memory, num_ranks, rank
from moetrain.tasks import registry
from moetrain.tasks.protocol import MakesLongerTasks, Split, TaskFamily

if TYPE_CHECKING:
    from moetrain.checkpoint.origin import Origin

_log = logging.getLogger(__name__)

_NEEDS_TOKENIZER = (ExportRun, EvalRun, ChatRun, GenerateRun, ServeRun, PrepareRun, RlRun)
"""Configs of the commands that use the tokenizer beside the weights of init_from."""
_GB = 1e9
_BYTES_PER_BYTE = 8
"""Bytes of memory per byte of text while a source is read and tokenised: 7.8 measured on English and code."""
_COMPRESSION = 4
_COMPRESSED = (".gz", ".zst", ".parquet")
_SURELY_TOO_LARGE, _MUCH = 2.0, 0.25
"""Shares of the available memory from which a source is refused, and is warned of."""
LOCAL_KINDS = (SourceKind.jsonl, SourceKind.parquet, SourceKind.text, *FOREIGN_KINDS)
"""Kinds of sources that are local files."""


def check_inputs(run: StageRun, *, planned: Sequence[Path] = (), world_size: int | None = None) -> None:
    """Raise `ConfigError` or `CheckpointError` for a missing folder, file or plugin, or a wrong number of ranks.

    planned: folders that earlier stages will write. world_size: number of ranks that will start; None takes the
    launcher's.
    """
    for field, value in _folders(run):
        if not value:
            raise ConfigError(f"{field} is empty: give a folder, or null")
        folder = user_path(value)
        if not folder.is_dir() and not any(folder.is_relative_to(parent) for parent in planned):
            problem = "this is a file, give a folder" if folder.exists() else "there is no such folder"
            raise CheckpointError(f"{field} is {value}: {problem}")
    if isinstance(run, TrainingRun) and run.continue_from and _is_inside(run.continue_from, run.run.path):
        raise ConfigError(
            f"continue_from is {run.continue_from}, the folder of this stage: a stage that continues another one needs "
            "its own folder; give another run.stage"
        )
    for plugin in run.plugins:
        plugin_spec(plugin)
    ranks = num_ranks() if world_size is None else world_size
    if isinstance(run, TrainingRun):
        run.parallel.check_world_size(ranks)
    elif ranks > 1 and not isinstance(run, EvalRun):
        raise ConfigError(
            f"{ranks} ranks were started, but this command runs in one process: start it without a launcher"
        )
    for name, source in _data(run).sources.items():
        if source.kind in LOCAL_KINDS:
            files = local_files(source)
            if not isinstance(run, PrepareRun | DataRun):
                _check_memory(name, files)
    folders = [*prepared_folders(_data(run)).values()]
    written = [folder for folder in folders if not any(folder.is_relative_to(parent) for parent in planned)]
    if len(written) == len(folders):
        hold_out_of(_data(run))
    for folder in folders:
        if folder in written:
            index = read_index(folder)
            if rank() == 0:  # for all ranks, because the folder may have thousands of files
                check_sizes(folder, index)
            if isinstance(run, DocumentRun) and index.vocab_size > run.model.vocab_size:
                raise ConfigError(
                    f"model.vocab_size is {run.model.vocab_size}, and {folder} was prepared with a tokenizer of "
                    f"{index.vocab_size} tokens: set model.vocab_size to {index.vocab_size} or more"
                )


def _check_memory(name: str, files: Sequence[Path]) -> None:
    """Raise ConfigError if a source is far too large for the memory of one process; warn if it takes much of it."""
    size = sum(path.stat().st_size * (_COMPRESSION if path.suffix in _COMPRESSED else 1) for path in files)
    available = available_memory()
    needed = _BYTES_PER_BYTE * size
    cure = "moetrain prepare tokenises it once, and kind=prepared then reads it from disk (docs/data-at-scale.md)"
    what = f"data.sources.{name} has {size / _GB:.3g} GB of text, which takes about {needed / _GB:.3g} GB of memory"
    if needed > _SURELY_TOO_LARGE * available:
        raise ConfigError(f"{what} in each process, and {available / _GB:.3g} GB are available: {cure}")
    if needed > _MUCH * available and rank() == 0:
        _log.warning("%s in each process, of %.3g GB: %s", what, available / _GB, cure)


def _is_inside(value: str, folder: Path) -> bool:
    return user_path(value).resolve().is_relative_to(user_path(folder).resolve())


def check_names(run: StageRun) -> None:
    """Load the plugins; raise `ConfigError` for an unregistered task, algorithm or format, or a missing `init_from`."""
    load_plugins(run.plugins)
    if isinstance(run, WeightsRun) and run.advice and not _continues(run):
        run.require_weights()
    if isinstance(run, DocumentRun | RlRun | EvalRun | ChatRun | BenchDraftsRun):
        family = registry.build(run.task, run.run.seed)
        has_dialogues = any(source.kind is SourceKind.dialogues for source in _data(run).sources.values())
        if has_dialogues or not isinstance(run, DocumentRun):
            registry.check_family(family, name=run.task.name)
        if isinstance(run, DocumentRun | EvalRun) and has_dialogues:  # the text that eval measures includes dialogues
            registry.demonstrator_of(family)
        if isinstance(run, RlRun | EvalRun):
            _compare_turns(run, family)
        if isinstance(run, EvalRun) and isinstance(family, MakesLongerTasks) and run.eval.num_tasks:
            _check_longer(run, family)
    if isinstance(run, RlRun):
        from moetrain.rl.registry import build  # loads torch

        build(run.rl)
    template_named(_data(run).tokenizer.template)
    for source in _data(run).sources.values():
        format_named(source.format)


def _compare_turns(run: RlRun | EvalRun, family: TaskFamily) -> None:
    """Warn if rollout.max_turns is too small for the demonstrator, who makes one call per turn, to finish a task."""
    if not isinstance(family, MakesLongerTasks) or rank() != 0:
        return
    if isinstance(run, EvalRun) and not run.eval.num_tasks:
        return  # it evaluates texts only
    longer = run.eval.longer_calls if isinstance(run, EvalRun) and run.eval.longer_tasks else []
    calls = max([family.trained_calls[1], *longer])
    if run.rollout.max_turns <= calls:
        _log.warning(
            "rollout.max_turns is %d, and tasks of %d calls need %d turns with one call per turn: they end as "
            "max_turns. Give rollout.max_turns=%d, which leaves room for calls that fail",
            *(run.rollout.max_turns, calls, calls + 1, 2 * calls),
        )


def _check_longer(run: EvalRun, family: MakesLongerTasks) -> None:
    """Raise the ConfigError of a family that makes no tasks of a length in eval.longer_calls: they are run last."""
    for calls in run.eval.longer_calls if run.eval.longer_tasks else ():
        make = partial(family.task_of_length, Split.held_out, run.eval.first_task, num_calls=calls)
        make_task(make, limit_s=run.rollout.environment_deadline_s)


def _continues(run: StageRun) -> bool:
    return isinstance(run, TrainingRun) and run.continue_from is not None


def check_records(run: StageRun) -> None:
    """Read all documents of the sources that are local files. `DataError` names the file and line that is invalid.

    Sources of `prepare` are skipped, because the command reads them itself. Conversations are rendered, unless the
    tokenizer is that of `init_from`.
    """
    if isinstance(run, PrepareRun):
        return
    template = _named_template(run)
    for name, source in _data(run).sources.items():
        if source.kind in LOCAL_KINDS:
            for document in renderable(read_documents(source, name=name), source, template=template, errors=[]):
                if template is not None:
                    document.rendered(template)


def _named_template(run: StageRun) -> ChatTemplate | None:
    """Return the chat template that the config alone determines; None if the weights of `init_from` do."""
    if not isinstance(run, DocumentRun):
        return None
    tokenizer = run.data.tokenizer
    if tokenizer.path is not None:
        folder = user_path(tokenizer.path)  # an earlier stage of the recipe may write it
        return load_tokenizer(tokenizer, folder).template_or_none if holds_tokenizer(folder) else None
    has_weights = run.init_from is not None or run.continue_from is not None
    return None if has_weights and tokenizer.template == AUTO else template_named(tokenizer.template)


def check_prepared(run: StageRun) -> None:
    """Read all files of prepared sources, with plans and tokenizers; `DataError` names the first that was changed."""
    for folder in prepared_folders(_data(run)).values():
        index = read_index(folder)
        check_contents(folder, index)
        check_plans(folder)
        if Tokenizer.load(folder / TOKENIZER).digest != index.tokenizer:
            raise DataError(
                f"{folder / TOKENIZER} is not the tokenizer with which the folder was prepared: copy it again"
            )


def check_weights(run: StageRun, *, planned: Sequence[Path] = ()) -> None:
    """Read the weights and the tokenizer that a stage uses; raise an error if they are damaged or do not fit.

    planned: folders that earlier stages will write, which are skipped.
    """
    named = {
        field: value
        for field, value in _folders(run)
        if not any(user_path(value).is_relative_to(folder) for folder in planned)
    }
    if isinstance(run, DocumentRun) and "data.tokenizer.path" in named:
        from moetrain.data.build import prepare_tokenizer  # loads torch

        # With data.tokenizer.path this only reads the tokenizer and checks its size.
        folder = Path(named["data.tokenizer.path"])
        tokenizer = prepare_tokenizer(run.data, folder=folder, num_rows=run.model.vocab_size)
        if needs_chat(run):
            tokenizer.check_chat()
    if isinstance(run, EvalRun) and "eval.before" in named:
        read_before(run)
    if "init_from" in named or "continue_from" in named:
        origin = _checked_origin(run, named)
        prepared = {
            name: folder
            for name, folder in prepared_folders(_data(run)).items()
            if not any(folder.is_relative_to(other) for other in planned)
        }
        _check_tokenizer(run, origin, prepared=prepared)


def _checked_origin(run: StageRun, named: Mapping[str, str]) -> "Origin":
    """Return the weights of a stage after checking that it can use them, and further weights that it names."""
    # These imports load torch, which a command line without weights does not need.
    from moetrain.checkpoint.origin import check_fit
    from moetrain.export.write import export_reasons
    from moetrain.run.document_stage import sections_of
    from moetrain.run.rl_stage import rl_start_point
    from moetrain.run.trained_context import check_context
    from moetrain.run.weights import (
        check_is_export,
        read_masters,
        read_same_model,
        read_weights,
        training_weights,
    )
    from moetrain.train.stage_tokenizer import check_tokenizer
    from moetrain.train.stages import document_start_point
    from moetrain.upcycle.stage import check_dense

    if isinstance(run, TrainingRun):
        origin = training_weights(run)
        check_fit(origin, run.model)
    else:
        origin = read_weights(named["init_from"])
    if isinstance(run, DocumentRun) and (run.data.tokenizer.path is None or "data.tokenizer.path" in named):
        check_tokenizer(run.data.tokenizer, origin)
    if isinstance(run, ExportRun):
        run.export.check_library()
        quant, form = exported_quant(origin.quant, given=run.quant), run.export.format
        check_consumers(export_reasons(origin.model, quant, format=form), run.export.wanted)
    if isinstance(run, DocumentRun):
        document_start_point(sections_of(run), origin)
    if isinstance(run, RlRun):
        rl_start_point(run, origin)
    if isinstance(run, UpcycleRun):
        check_dense(origin, model=run.model)
    if isinstance(run, ChatRun):
        check_length(origin.model, name="max_turn_tokens", length=run.max_turn_tokens)
    if isinstance(run, ServeRun) and run.serve.max_tokens is not None:
        check_length(origin.model, name="serve.max_tokens", length=run.serve.max_tokens)
    if isinstance(run, EvalRun) and run.eval.num_tasks and not run.eval.other_context:
        check_context(run.task.context, origin, otherwise=", or eval.other_context=true")
    if isinstance(run, EvalRun):
        check_length(origin.model, name="rollout.max_tokens", length=run.rollout.max_tokens)
    if isinstance(run, VerifyExportsRun):
        check_is_export(origin, given=run.init_from)
    for field in ("masters", "eval.masters"):
        if field in named:
            read_masters(named[field], field=field, origin=origin)
    if "eval.codes_before" in named:
        read_same_model(named["eval.codes_before"], field="eval.codes_before", origin=origin)
    return origin


def _check_tokenizer(run: StageRun, origin: "Origin", *, prepared: Mapping[str, Path]) -> None:
    """Raise an error if the tokenizer beside the weights does not suit the stage. prepared: its folders, by source."""
    from moetrain.data.store.rows import check_prepared_with
    from moetrain.run.weights import tokenizer_of

    if origin.tokenizer is None and not isinstance(run, _NEEDS_TOKENIZER):
        return
    tokenizer = tokenizer_of(origin)
    if not keeps_tokenizer(run):
        return
    if needs_chat(run):
        stage_template(run, tokenizer).check_chat()
    if isinstance(run, DocumentRun):
        check_prepared_with(prepared, stage_template(run, tokenizer))


def _folders(run: StageRun) -> Iterator[tuple[str, str]]:
    """Yield (field, folder) for each folder that a config names as input."""
    named = {"init_from": run.init_from if isinstance(run, WeightsRun) else None}
    if isinstance(run, TrainingRun):
        named["continue_from"] = run.continue_from
    if isinstance(run, VerifyExportsRun):
        named["masters"] = run.masters
    if isinstance(run, EvalRun):
        evaluation = run.eval
        named |= {
            "eval.masters": evaluation.masters,
            "eval.before": evaluation.before,
            "eval.codes_before": evaluation.codes_before,
        }
    named["data.tokenizer.path"] = _data(run).tokenizer.path
    for field, value in named.items():
        if value is not None:
            yield field, value


def _data(run: StageRun) -> DataConfig:
    return run.data if isinstance(run, DocumentRun | EvalRun | PrepareRun) else DataConfig()
