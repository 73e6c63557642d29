"""`moetrain eval`."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moetrain.config import EvalRun, check_length
from moetrain.errors import ConfigError
from moetrain.files import write_json
from moetrain.run.earlier_evaluation import read_before
from moetrain.run.inputs import check_records
from moetrain.run.stage import stage_folder
from moetrain.runtime import num_ranks

if TYPE_CHECKING:
    from moetrain.checkpoint.origin import Origin


def main(run: EvalRun) -> int:
    """Run the stage; return its exit code."""
    if run.init_from is None:
        raise ConfigError("init_from is null: give the export to evaluate")
    # These bring torch in, so only now.
    from moetrain.eval.divergence import code_changes
    from moetrain.eval.stage import EVAL, evaluate
    from moetrain.inference.weights import build_weights
    from moetrain.parallel.config import EngineName, ParallelConfig
    from moetrain.parallel.topology import setup
    from moetrain.quant.config import QuantConfig
    from moetrain.rollout.traces import write_traces
    from moetrain.run.weights import read_beside, read_masters, read_weights, tokenizer_of
    from moetrain.tasks import registry

    check_records(run)  # they are read last, when all tasks were rolled out
    before = read_before(run)
    with stage_folder(run) as folder:
        # One process needs no group, and without one DeepSpeed need not be imported. Weights go to this rank's device.
        topology = setup(ParallelConfig(engine=EngineName.deepspeed if num_ranks() > 1 else EngineName.torch))
        origin = read_weights(run.init_from)
        tokenizer = tokenizer_of(origin)
        tokenizer.check_chat()
        check_length(origin.model, name="rollout.max_tokens", length=run.rollout.max_tokens)
        unquantized = QuantConfig()
        masters = earlier = None  # read before the tasks are rolled out, which takes longest
        if run.eval.masters is not None:
            masters = read_masters(run.eval.masters, field="eval.masters", origin=origin)
        if run.eval.codes_before is not None:
            earlier = read_beside(run.eval.codes_before, field="eval.codes_before", origin=origin)
        evaluation = evaluate(
            run.eval,
            weights=build_weights(origin.tensors, config=origin.model, quant=origin.quant or unquantized),
            masters=build_weights(masters.tensors, config=masters.model, quant=unquantized) if masters else None,
            family_of=lambda task: registry.build(task, run.run.seed),
            task=run.task,
            tokenizer=tokenizer,
            rollout=run.rollout,
            seed=run.run.seed,
            before=before,
            topology=topology,
        )
        if evaluation is None:
            return 0
        numbers = {**evaluation.numbers, **_language(run, origin)}
        if earlier is not None:
            quant = origin.quant or unquantized
            numbers["code_changes"] = code_changes(earlier.tensors, origin.tensors, quant=quant)
        for mode, trajectories in evaluation.trajectories.items():
            path = folder / "traces" / f"{mode}.jsonl"
            write_traces(path, trajectories[: run.eval.num_traces], tokenizer=tokenizer)
        write_json(folder / EVAL, numbers)
    return 0


def _language(run: EvalRun, origin: "Origin") -> dict[str, dict[str, Any]]:
    """Return nats a character on the validation split of each source, and the digests of what was read."""
    if not run.data.sources:
        return {"language": {}}
    from moetrain.data.build import build_data
    from moetrain.eval.language import nats_per_character
    from moetrain.run.reading_stage import dialogues_of
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
