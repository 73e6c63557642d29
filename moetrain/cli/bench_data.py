"""`moetrain bench data`."""

from moetrain.cli.bench import run_bench
from moetrain.commands.bench import BenchDataRun


def main(run: BenchDataRun) -> int:
    """Measure preparing and reading tokens, print the tables and write bench.json. Checks no bound; returns 0."""
    from moetrain.bench.data import bench_data, render

    return run_bench(run, lambda folder: bench_data(run, folder=folder), render=render)
