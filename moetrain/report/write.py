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
    _write(folder / PAGE, run_page(run, num_trajectories=config.num_trajectories))
    write_json(folder / RESULTS_JSON, results(run))
    _write(folder / RESULTS_MARKDOWN, text)
    write_json(folder / TIMES, times(run))


def _write(path: Path, text: str) -> None:
    """Write text in which lone surrogates, which a JSON escape in an edited file can produce, become question marks."""
    write_text(path, text.encode("utf-8", "replace").decode("utf-8"))


def _left_out(run: Run) -> list[str]:
    return [f"Not finished: {', '.join(run.unfinished)}.\n"] if run.unfinished else []
