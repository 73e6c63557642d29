"""`moetrain eval`."""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from moetrain.commands.stage import check_length
from moetrain.commands.weights import EvalRun
from moetrain.errors import ConfigError
from moetrain.parallel.config import EngineName, ParallelConfig
from moetrain.report.table import NONE, rate_text
from moetrain.rollout.config import RolloutConfig
from moetrain.run.earlier_evaluation import read_before
from moetrain.run.inputs import check_records
from moetrain.run.plugins import plugins_digest
from moetrain.run.stage import stage_folder, stage_metrics
from moetrain.runtime import num_ranks

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from moetrain.checkpoint.origin import Origin
    from moetrain.eval.stage import Contestant
    from moetrain.quant.config import QuantConfig
    from moetrain.quant.grids import Quantized
    from moetrain.run.evaluation_files import EvaluationFiles


def main(run: EvalRun) -> int:
    """Run the stage; return its exit code."""
    run.require_weights()
    if not run.eval.num_tasks and not run.data.sources:
        raise ConfigError("eval.num_tasks is 0 and data.sources is empty: give tasks or texts to evaluate on")
    # These imports load torch, so they wait until the input has been checked.
    from moetrain.eval.summary import check_scored, metric_values
    from moetrain.run.evaluation_files import EvaluationFiles

    check_records(run)  # they are used after the rollouts, so an error would appear late
    before = read_before(run)
    with stage_folder(run) as folder:
        files = EvaluationFiles(folder, num_traces=run.eval.num_traces)
        numbers = _numbers(run, files=files, before=before)
        if numbers is not None:
            with stage_metrics(run) as metrics:
                metrics.write(0, metric_values(numbers))
            files.publish(numbers)
            _show(numbers, folder=folder)
            check_scored(numbers)
    return 0


def _show(numbers: "Mapping[str, Any]", *, folder: "Path") -> None:
    """Print the results: success and reward by mode, and the loss by source."""
    table = Table("mode", "% solved, 95 % interval", "tasks", "mean reward", title=str(folder), title_justify="left")
    for name, summary in numbers["modes"].items():
        reward = summary.get("reward")  # an evaluation that an older version began has none
        mean = NONE if reward is None else f"{reward:.3f}"
        table.add_row(name, rate_text(summary["all"]), str(summary["all"]["count"]), mean)
    for source, nats in numbers["language"].items():
        table.add_row(f"{source}, nats per character", NONE if nats is None else f"{nats:.4f}", "", "")
    Console().print(table)


def _numbers(run: EvalRun, *, files: "EvaluationFiles", before: "Mapping[str, Any] | None") -> dict[str, Any] | None:
    """Run the evaluation. Returns the content of `eval.json` on rank 0, else None."""
    from moetrain.eval.divergence import code_changes
    from moetrain.eval.stage import Setting, evaluate
    from moetrain.parallel.topology import setup
    from moetrain.quant.config import QuantConfig
    from moetrain.run.trained_context import check_context
    from moetrain.run.weights import read_masters, read_same_model, read_weights, tokenizer_of, unquantized, with_codes
    from moetrain.tasks import registry

    # A single process needs no process group, so it does not import DeepSpeed. `setup` also selects this rank's device.
    topology = setup(ParallelConfig(engine=EngineName.deepspeed if num_ranks() > 1 else EngineName.torch))
    origin = read_weights(run.require_weights())
    if not run.eval.num_tasks:
        return {"modes": {}, **_language(run, origin)} if topology.is_main else None
    tokenizer = tokenizer_of(origin)
    tokenizer.check_chat()
    if not run.eval.other_context:
        check_context(run.task.context, origin, otherwise=", or eval.other_context=true")
    check_length(origin.model, name="rollout.max_tokens", length=run.rollout.max_tokens)
    masters = earlier = None  # read before the rollouts, which take longest, so that a bad folder fails early
    if run.eval.masters is not None:
        masters = read_masters(run.eval.masters, field="eval.masters", origin=origin)
    if run.eval.codes_before is not None:
        earlier = read_same_model(run.eval.codes_before, field="eval.codes_before", origin=origin)

    setting = Setting(
        config=run.eval,
        family_of=lambda task: registry.build(task, run.run.seed),
        task=run.task,
        tokenizer=tokenizer,
        rollout=run.rollout,
        seed=run.run.seed,
        plugins=plugins_digest(run.plugins),
        finished=files.finished,
        on_finished=partial(files.keep_traces, tokenizer=tokenizer),
        topology=topology,
    )
    quant, is_main = origin.quant or QuantConfig(), topology.is_main
    numbers = evaluate(
        setting,
        export=_contestant(origin, rollout=run.rollout, is_main=is_main),
        masters=_contestant(unquantized(masters), rollout=run.rollout, is_main=is_main) if masters else None,
        before=before,
    )
    if numbers is None:
        return None
    numbers["weights_format"] = quant.format.value if quant.enabled else "bf16"
    if earlier is not None:
        numbers["code_changes"] = code_changes(_codes_like(earlier, quant), with_codes(origin), quant=quant)
    return {**numbers, **_language(run, origin)}


def _codes_like(origin: "Origin", quant: "QuantConfig") -> "Mapping[str, Tensor | Quantized]":
    """Return weights with their stored codes if these are codes of `quant`; else all of them as tensors."""
    from moetrain.run.weights import with_codes

    stored = origin.quant or quant
    is_alike = (stored.format, stored.group_size) == (quant.format, quant.group_size)
    return with_codes(origin) if is_alike else origin.tensors


def _contestant(origin: "Origin", *, rollout: RolloutConfig, is_main: bool) -> "Contestant":
    """Return weights to evaluate, in the form for generation."""
    from moetrain.eval.stage import Contestant
    from moetrain.kernels.choice import find_for_generation
    from moetrain.run.weights import generation_model

    library = find_for_generation(rollout.kernels)
    model = generation_model(origin, library=library, mode=rollout.mode)
    return Contestant(model=model, digest=origin.digest if is_main else "")


def _language(run: EvalRun, origin: "Origin") -> dict[str, dict[str, Any]]:
    """Return the loss in nats per character on each source's validation split, and digests of the data read."""
    if not run.data.sources:
        return {"language": {}}
    from moetrain.data.build import build_data
    from moetrain.eval.language import nats_per_character
    from moetrain.run.document_stage import dialogues_of
    from moetrain.run.weights import tokenizer_of

    assert origin.tokenizer is not None  # tokenizer_of checked it
    own = replace(run.data.tokenizer, path=str(origin.tokenizer), vocab_size=None)
    data = build_data(
        replace(run.data, tokenizer=own),
        run.run.seed,
        tokenizer_folder=origin.tokenizer,
        dialogues=dialogues_of(run.data, run.task, seed=run.run.seed)(tokenizer_of(origin)),
    )
    found = nats_per_character(origin.tensors, origin.model, validation=data.validation)
    return {"language": found, "digests": dict(data.digests)}
