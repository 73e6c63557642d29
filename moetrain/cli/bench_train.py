"""`moetrain bench train`."""

from rich.console import Console

from moetrain.commands import BenchTrainRun
from moetrain.files import write_json
from moetrain.run.stage import stage_folder

_WIDTH = 130  # of the table, also where there is no terminal


def main(run: BenchTrainRun) -> int:
    """Measure ours and the peers in turn, print the tables and write bench.json; judges nothing."""
    from moetrain.bench.train import bench_train, render  # brings torch in, so only now

    with stage_folder(run) as folder:
        report = bench_train(run, folder=folder)
        write_json(folder / "bench.json", report)
        for table in render(report):
            Console(width=_WIDTH).print(table)
    return 0
