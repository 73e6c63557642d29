"""`moetrain bench decode`."""

from rich.console import Console

from moetrain.files import write_json
from moetrain.generation_commands import BenchDecodeRun
from moetrain.run.stage import stage_folder

_WIDTH = 130  # of the table in characters, also when the output is not a terminal


def main(run: BenchDecodeRun) -> int:
    """Measure moetrain and its peers in turn, print the tables and write bench.json. Checks no bound; returns 0."""
    from moetrain.bench.decode import bench_decode, render  # loads torch

    with stage_folder(run) as folder:
        report = bench_decode(run, folder=folder)
        write_json(folder / "bench.json", report)
        for table in render(report):
            Console(width=_WIDTH).print(table)
    return 0
