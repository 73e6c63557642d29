"""`moetrain bench train`."""

from rich.console import Console

from moetrain.commands import BenchTrainRun
from moetrain.files import write_json
from moetrain.run.stage import stage_folder

_WIDTH = 130  # of the table in characters, also when the output is not a terminal


def main(run: BenchTrainRun) -> int:
    """Measure moetrain and its peers in turn, print the tables and write bench.json. Checks no bound; returns 0."""
    from moetrain.bench.train import bench_train, render  # loads torch

    with stage_folder(run) as folder:
        report = bench_train(run, folder=folder)
        write_json(folder / "bench.json", report)
        for table in render(report):
            Console(width=_WIDTH).print(table)
    return 0
