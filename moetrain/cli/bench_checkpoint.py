"""`moetrain bench checkpoint`."""

from moetrain.cli.bench import run_bench
from moetrain.commands.bench import BenchCheckpointRun


def main(run: BenchCheckpointRun) -> int:
    """Measure writing, reading and saving beside training, print the tables, write bench.json. Checks no bound."""
    from moetrain.bench.checkpoint import bench_checkpoint, render

    return run_bench(run, lambda folder: bench_checkpoint(run, folder=folder), render=render)
