"""`moetrain report`: the page and the tables of a run. Needs no torch."""

from pathlib import Path

from rich.console import Console

from moetrain.config import ReportRun
from moetrain.report.stages import Kind, Run, read_run
from moetrain.report.table import show, tables
from moetrain.report.write import PAGE, RESULTS_JSON, RESULTS_MARKDOWN, write_report
from moetrain.run.stage import stage_folder

_PLAIN_WIDTH = 120


def main(run: ReportRun) -> int:
    """Write the report of the run `run.folder/run.name`, print its tables and where the files lie; return 0."""
    found = read_run(run.run.path.parent, run.report.stages)
    with stage_folder(run) as folder:
        write_report(found, run.report, folder=folder)
    print_tables(found, run.run.path)
    return 0


def print_again(run: ReportRun) -> None:
    """Print the tables of a report that was written before."""
    print_tables(read_run(run.run.path.parent, run.report.stages), run.run.path)


def print_tables(found: Run, folder: Path) -> None:
    """Print the tables of a run, and where its report in `folder` and its exports lie."""
    console = Console()
    show(tables(found), console if console.is_terminal else Console(width=_PLAIN_WIDTH))
    unfinished = [*found.missing, *(stage.name for stage in found.stages if not stage.is_finished)]
    print()
    if unfinished:
        print(f"not finished: {', '.join(unfinished)}")
    print(f"report    {folder / PAGE}")
    print(f"numbers   {folder / RESULTS_JSON}, {folder / RESULTS_MARKDOWN}")
    for stage in found.of_kind(Kind.export):
        if stage.export:
            print(f"export    {stage.folder / 'model'}")
