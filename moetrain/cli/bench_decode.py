"""`moetrain bench decode`."""

from moetrain.cli.bench import run_bench
from moetrain.commands.bench_generation import BenchDecodeRun


def main(run: BenchDecodeRun) -> int:
    """Measure moetrain and its peers in turn, print the tables and write bench.json. Checks no bound; returns 0."""
    from moetrain.bench.decode import bench_decode, render  # loads torch

    return run_bench(run, lambda folder: bench_decode(run, folder=folder), render=render)
