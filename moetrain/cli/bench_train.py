"""`moetrain bench train`."""

from moetrain.cli.bench import run_bench
from moetrain.commands.bench import BenchTrainRun


def main(run: BenchTrainRun) -> int:
    """Measure moetrain and its peers in turn, print the tables and write bench.json. Checks no bound; returns 0."""
    from moetrain.bench.train import bench_train, render  # loads torch

    return run_bench(run, lambda folder: bench_train(run, folder=folder), render=render)
