"""Checks, before a recipe starts, that each stage can use the output of the stages before it.

The shape, grid and tokenizer that a stage will write follow from its config. Files that are already on disk are checked
when they are read (`run.inputs`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moetrain.chat.registry import AUTO, template_named
from moetrain.checkpoint.identity import as_stored
from moetrain.checkpoint.shape import mismatched_fields, shape_changes, stored_shape
from moetrain.commands.data import PrepareRun
from moetrain.commands.stage import StageRun, WeightsRun, check_groups, check_length
from moetrain.commands.training import DocumentRun, RlRun, TrainingRun
from moetrain.commands.verify import VerifyExportsRun
from moetrain.commands.weights import ChatRun, EvalRun, ExportRun, UpcycleRun
from moetrain.data.chat_tokenizer import with_named_template
from moetrain.data.config import SourceKind, TokenizerConfig
from moetrain.data.store.index import TOKENIZER as PREPARED_TOKENIZER
from moetrain.data.tokenizer import Tokenizer, holds_tokenizer
from moetrain.errors import ConfigError, DataError
from moetrain.export.config import ExportFormat, exported_quant
from moetrain.export.consumers import consumer_reasons
from moetrain.files import user_path
from moetrain.hf.consumers import check_consumers
from moetrain.model.config import ModelConfig
from moetrain.quant.config import QuantConfig
from moetrain.run.begun import as_begun
from moetrain.run.same_context import check_same_context
from moetrain.train.config import Continuation
from moetrain.train.continuation import length_problem, other_command, settings_problem, sources_problem
from moetrain.upcycle.config import NEW_FIELDS

_Tokenizer = DocumentRun | PrepareRun | Path
"""The stage that trains a tokenizer, or the folder with a tokenizer."""


def shape_of(weights: str, earlier: Sequence[StageRun]) -> ModelConfig | None:
    """Return the shape of the weights in a folder that an earlier stage writes or that exists, or None.

    A stage that trains a tokenizer may write weights with fewer rows than this, until it has written a checkpoint.
    """
    writer = _writer_of(weights, earlier)
    if writer is None:
        return stored_shape(weights)
    if isinstance(writer, DocumentRun):
        return as_begun(writer).model
    if isinstance(writer, TrainingRun | UpcycleRun):
        return writer.model
    return shape_of(writer.init_from, earlier) if isinstance(writer, ExportRun) and writer.init_from else None


def check_chain(stages: Sequence[tuple[str, StageRun]]) -> None:
    """Raise ConfigError, which names the first stage that cannot use the output of the stages before it."""
    for number, (name, run) in enumerate(stages):
        try:
            _check_stage(run, [before for _, before in stages[:number]])
        except (ConfigError, DataError) as error:
            raise ConfigError(f"stage {name}: {error}") from None


def needs_chat(run: StageRun) -> bool:
    """Return whether a stage renders dialogues, for which its tokenizer needs the tokens of the chat template."""
    if isinstance(run, DocumentRun):
        sources = run.data.sources.values()
        return any(source.kind is SourceKind.dialogues or source.format == "messages" for source in sources)
    return isinstance(run, RlRun | ChatRun) or (isinstance(run, EvalRun) and run.eval.num_tasks > 0)


def keeps_tokenizer(run: StageRun) -> bool:
    """Return whether a stage uses the tokenizer of its initial weights."""
    return not isinstance(run, DocumentRun) or (run.data.tokenizer.path is None and not run.data.tokenizer.retrain)


def stage_template(run: StageRun, tokenizer: Tokenizer) -> Tokenizer:
    """Return the tokenizer of the weights of `run` with the chat template that its config names, if it names one."""
    if not isinstance(run, DocumentRun):
        return tokenizer
    return with_named_template(tokenizer, run.data.tokenizer, num_rows=run.model.vocab_size)


def _check_stage(run: StageRun, earlier: Sequence[StageRun]) -> None:
    weights = _weights(run)
    if weights is None or _writer_of(weights, earlier) is None:
        return
    model = shape_of(weights, earlier)
    if model is None:
        raise ConfigError(f"init_from is {weights}: that stage writes no weights; name one that trains or exports")
    if isinstance(run, TrainingRun) and run.continue_from is not None:
        _check_continued(run, run.continue_from, earlier)
    if isinstance(run, UpcycleRun):
        _check_dense(model, run, weights)
    if isinstance(run, ExportRun):
        run.export.check_library()
        check_consumers(consumer_reasons(model, run.export.format), run.export.wanted)
        quant = exported_quant(_quant_of(weights, earlier), given=run.quant)
        if run.export.format is ExportFormat.quantized or (run.export.format is ExportFormat.gguf and quant.enabled):
            check_groups(model, quant)
    if isinstance(run, EvalRun):
        check_length(model, name="rollout.max_tokens", length=run.rollout.max_tokens)
        if run.eval.num_tasks and not run.eval.other_context and (context := _context_of(weights, earlier)):
            otherwise = ", or eval.other_context=true"
            check_same_context(run.task.context, context, weights=Path(weights), otherwise=otherwise)
    if isinstance(run, VerifyExportsRun):
        _check_export_and_masters(run, earlier)
    for field, value in _same_model(run):
        other = shape_of(value, earlier)
        if other is not None and (mismatches := mismatched_fields(model, other)):
            raise ConfigError(f"{field} is {value}: that is another model than {weights} ({'; '.join(mismatches)})")
    _check_tokenizer(run, weights, earlier)


def _check_export_and_masters(run: VerifyExportsRun, earlier: Sequence[StageRun]) -> None:
    if run.init_from and not isinstance(_writer_of(run.init_from, earlier), ExportRun):
        raise ConfigError(f"init_from is {run.init_from}: not an export; give the folder of an export stage")
    if run.masters and isinstance(_writer_of(run.masters, earlier), ExportRun):
        raise ConfigError(f"masters is {run.masters}: this is an export; give the stage it was made from")


def _context_of(weights: str, earlier: Sequence[StageRun]) -> dict[str, Any] | None:
    """Return the context policy with which an earlier stage trains the weights; None if it is not known."""
    writer = _writer_of(weights, earlier)
    if isinstance(writer, ExportRun):
        return _context_of(writer.init_from, earlier) if writer.init_from else None
    return asdict(writer.task.context) if isinstance(writer, DocumentRun | RlRun) else None


def _check_continued(run: TrainingRun, origin: str, earlier: Sequence[StageRun]) -> None:
    """Raise ConfigError if a stage cannot continue the stage of `origin` that is before it."""
    before = _writer_of(origin, earlier)
    if not isinstance(before, TrainingRun):
        raise ConfigError(f"continue_from is {origin}: that stage does not train, so it has no run to continue")
    if isinstance(run, RlRun) != isinstance(before, RlRun):
        raise ConfigError(other_command(origin))
    steps = _steps_at(origin, before, earlier)
    problem = settings_problem(before.optim.name, before.run.seed, path=origin, optim=run.optim, seed=run.run.seed) or (
        None if steps is None else length_problem(steps, path=origin, train=run.train)
    )
    if problem is None and isinstance(run, DocumentRun) and isinstance(before, DocumentRun):
        problem = sources_problem(as_stored(asdict(before.data)), as_stored(asdict(run.data)), path=origin)
    if problem is not None:
        raise ConfigError(problem)


def _steps_at(origin: str, run: TrainingRun, earlier: Sequence[StageRun]) -> int | None:
    """Return how many steps the run of `run` has taken at its end; None for one of its checkpoints or if not known."""
    if user_path(origin) != user_path(str(run.run.path)):
        return None
    if run.train.continue_as is not Continuation.part or run.continue_from is None:
        return run.train.steps
    before = _writer_of(run.continue_from, earlier)
    taken = _steps_at(run.continue_from, before, earlier) if isinstance(before, TrainingRun) else None
    return None if taken is None else taken + run.train.steps


def _check_dense(dense: ModelConfig, run: UpcycleRun, weights: str) -> None:
    if dense.num_moe_layers:
        raise ConfigError(
            f"init_from is {weights}: {dense.num_moe_layers} of its {dense.num_layers} layers have experts already; "
            "give dense weights (model.num_dense_layers = model.num_layers)"
        )
    if mismatches := [line for line in shape_changes(dense, run.model) if not line.startswith(NEW_FIELDS)]:
        raise ConfigError(
            f"model does not fit the dense weights of {weights} ({'; '.join(mismatches)}): change these fields"
        )


def _same_model(run: StageRun) -> Iterator[tuple[str, str]]:
    """Yield (field, folder) of further weights that must be of the same model as init_from."""
    named: dict[str, str | None] = {}
    if isinstance(run, VerifyExportsRun):
        named["masters"] = run.masters
    if isinstance(run, EvalRun):
        named |= {"eval.masters": run.eval.masters, "eval.codes_before": run.eval.codes_before}
    for field, value in named.items():
        if value:
            yield field, value


def _quant_of(weights: str, earlier: Sequence[StageRun]) -> QuantConfig | None:
    """Return the quantisation with which an earlier stage trains the weights; None if it trains without."""
    writer = _writer_of(weights, earlier)
    return writer.quant if isinstance(writer, TrainingRun) and writer.quant.enabled else None


def _check_tokenizer(run: StageRun, weights: str, earlier: Sequence[StageRun]) -> None:
    """Raise ConfigError if a stage names another tokenizer than that of its weights, or needs chat tokens it lacks."""
    weights_tokenizer = _tokenizer_of(weights, earlier)
    if isinstance(run, DocumentRun) and not run.data.tokenizer.retrain and weights_tokenizer is not None:
        own = run.data.tokenizer
        named = None if own.path is None else _named_tokenizer(own.path, earlier)
        if named is not None and not _is_same(named, weights_tokenizer):
            raise ConfigError(
                f"data.tokenizer.path is {own.path}: that is another tokenizer than that of {weights}; leave it out, "
                "or give data.tokenizer.retrain=true to train these weights with another tokenizer"
            )
        if isinstance(weights_tokenizer, DocumentRun) and own.vocab_size is not None:
            size = weights_tokenizer.data.tokenizer.vocab_size
            if size is not None and own.vocab_size != size:
                raise ConfigError(
                    f"data.tokenizer.vocab_size is {own.vocab_size}: the tokenizer of {weights} has {size} tokens; "
                    "leave data.tokenizer.vocab_size out"
                )
        if weights_tokenizer is not None:
            _check_prepared(run, weights, tokenizer=weights_tokenizer, earlier=earlier)
    if weights_tokenizer is None or not needs_chat(run) or not keeps_tokenizer(run):
        return
    if isinstance(weights_tokenizer, Path):
        stage_template(run, Tokenizer.load(weights_tokenizer)).check_chat()
    elif isinstance(run, DocumentRun):
        _check_template(run, weights, trained=weights_tokenizer.data.tokenizer)


def _check_prepared(run: DocumentRun, weights: str, *, tokenizer: _Tokenizer, earlier: Sequence[StageRun]) -> None:
    """Raise ConfigError if a source was or will be prepared with another tokenizer than that of the weights."""
    for name, source in run.data.sources.items():
        if source.kind is SourceKind.prepared and source.path is not None:
            prepared = _prepared_tokenizer(source.path, earlier)
            if prepared is not None and not _is_same(prepared, tokenizer):
                raise ConfigError(
                    f"data.sources.{name}.path is {source.path}: it is prepared with another tokenizer than that of "
                    f"{weights}; prepare it with init_from={weights}"
                )


def _check_template(run: DocumentRun, weights: str, *, trained: TokenizerConfig) -> None:
    """Raise ConfigError if a tokenizer that a stage will train has no room for the tokens of another chat template."""
    wanted, given = run.data.tokenizer.template, template_named(trained.template)
    if wanted == AUTO:
        return
    more = set(template_named(wanted).special_tokens) - set(given.special_tokens)
    num_rows = run.model.vocab_size
    if num_rows - (trained.vocab_size or num_rows) < len(more):
        raise ConfigError(
            f"data.tokenizer.template is {wanted}, and the tokenizer of {weights} is trained for {given.name}, with no "
            f"rows left for {len(more)} more tokens: give data.tokenizer.template={wanted} to the stage that trains it"
        )


def _prepared_tokenizer(path: str, earlier: Sequence[StageRun]) -> _Tokenizer | None:
    """Return the tokenizer of prepared data that an earlier stage writes or that is on disk; None if not known yet."""
    writer = _writer_of(path, earlier)
    if isinstance(writer, PrepareRun):
        if writer.data.tokenizer.path is not None:
            return _named_tokenizer(writer.data.tokenizer.path, earlier)
        return _tokenizer_of(writer.init_from, earlier) if writer.init_from is not None else writer
    folder = user_path(path) / PREPARED_TOKENIZER
    return folder if writer is None and holds_tokenizer(folder) else None


def _tokenizer_of(weights: str, earlier: Sequence[StageRun]) -> _Tokenizer | None:
    """Return the stage that trains the tokenizer of the weights, or the tokenizer's folder; None if not known yet."""
    writer = _writer_of(weights, earlier)
    if writer is None:
        return None
    before = _weights(writer)
    if isinstance(writer, DocumentRun):
        if writer.data.tokenizer.path is not None:
            return _named_tokenizer(writer.data.tokenizer.path, earlier)
        if before is None or writer.data.tokenizer.retrain:
            prepared = [each.path for each in writer.data.sources.values() if each.kind is SourceKind.prepared]
            return _prepared_tokenizer(prepared[0], earlier) if prepared and prepared[0] is not None else writer
    return None if before is None else _tokenizer_of(before, earlier)


def _named_tokenizer(path: str, earlier: Sequence[StageRun]) -> _Tokenizer | None:
    """Return the tokenizer in the folder `path`; None if there is none, which is an error when the folder is read."""
    if _writer_of(path, earlier) is not None:
        return _tokenizer_of(path, earlier)
    folder = user_path(path)
    return folder if holds_tokenizer(folder) else None


def _is_same(one: _Tokenizer, other: _Tokenizer) -> bool:
    if isinstance(one, Path) and isinstance(other, Path):
        return one == other or Tokenizer.load(one).digest == Tokenizer.load(other).digest
    return one is other


def _weights(run: StageRun) -> str | None:
    if isinstance(run, TrainingRun) and run.continue_from:
        return run.continue_from
    return run.init_from if isinstance(run, WeightsRun) else None


def _writer_of(weights: str, earlier: Sequence[StageRun]) -> StageRun | None:
    """Return the earlier stage whose folder contains the path `weights`, or None."""
    path = user_path(weights)
    return next((run for run in earlier if path.is_relative_to(user_path(str(run.run.path)))), None)
