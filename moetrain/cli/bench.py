"""What the benchmark commands with contestants have in common."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from moetrain.commands.stage import StageRun
from moetrain.files import write_result
from moetrain.run.stage import stage_folder

_WIDTH = 130  # of the table in characters, also when the output is not a terminal


def run_bench(
    run: StageRun,
    measure: Callable[[Path], Mapping[str, Any]],
    *,
    render: Callable[[Mapping[str, Any]], Iterable[RenderableType]],
) -> int:
    """Measure in the stage's folder, write bench.json and print the tables. Checks no bound; returns 0.

    measure: takes the folder and returns the report. render: makes what is printed of a report.
    """
    with stage_folder(run) as folder:
        report = measure(folder)
        write_result(folder / "bench.json", report)
        for part in render(report):
            Console(width=_WIDTH).print(part)
    return 0
