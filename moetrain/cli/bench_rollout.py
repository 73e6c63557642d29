"""`moetrain bench rollout`."""

from typing import TYPE_CHECKING

from moetrain.cli.bench import run_bench
from moetrain.commands.bench_generation import BenchRolloutRun
from moetrain.commands.stage import check_length

if TYPE_CHECKING:
    from moetrain.bench.rollout import Weights


def main(run: BenchRolloutRun) -> int:
    """Measure moetrain and its peers in turn, print the table and write bench.json. Checks no bound; returns 0."""
    from moetrain.bench.rollout import bench_rollout, render  # loads torch

    weights = _weights(run)
    return run_bench(run, lambda folder: bench_rollout(run, weights=weights, folder=folder), render=render)


def _weights(run: BenchRolloutRun) -> "Weights":
    """Return the weights of `init_from`, or random ones."""
    from moetrain.bench.rollout import Weights, drawn_weights

    if run.init_from is None:
        return drawn_weights(run)
    from moetrain.run.weights import read_weights, tokenizer_of

    origin = read_weights(run.init_from)
    tokenizer = tokenizer_of(origin)
    tokenizer.check_chat()
    check_length(origin.model, name="rollout.max_tokens", length=run.rollout.max_tokens)
    return Weights(
        reader=origin.reader,
        model=origin.model,
        quant=origin.quant if origin.quant is not None and origin.quant.enabled else run.quant,
        tokenizer=tokenizer,
        source=run.init_from,
    )
