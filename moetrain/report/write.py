"""Writes a run's report: the page, and its numbers as JSON and Markdown. Each file is written atomically.

A repetition of the run reproduces `results.json` and `results.md` exactly. `times.json` contains measured times.
"""

from pathlib import Path

from moetrain.files import write_json, write_text
from moetrain.report.config import ReportConfig
from moetrain.report.numbers import results, times
from moetrain.report.run_page import run_page
from moetrain.report.stages import Run
from moetrain.report.table import markdown, tables
from moetrain.stage_files import TIMES

PAGE, RESULTS_JSON, RESULTS_MARKDOWN = "report.html", "results.json", "results.md"


def write_report(run: Run, config: ReportConfig, *, folder: Path) -> None:
    """Write the four files of a report into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join([f"# {run.name}\n", *(markdown(table) for table in tables(run)), *_left_out(run)])
    write_text(folder / PAGE, run_page(run, num_trajectories=config.num_trajectories))
    write_json(folder / RESULTS_JSON, results(run))
    write_text(folder / RESULTS_MARKDOWN, text)
    write_json(folder / TIMES, times(run))


def _left_out(run: Run) -> list[str]:
    return [f"Not finished: {', '.join(run.unfinished)}.\n"] if run.unfinished else []
