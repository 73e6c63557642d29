"""`moetrain report`: writes the HTML report of a run and prints its tables. Does not load torch."""

from pathlib import Path

from rich.console import Console

from moetrain.commands.recipe import ReportRun
from moetrain.report.stages import Kind, Run, read_run
from moetrain.report.table import show, tables
from moetrain.report.write import PAGE, RESULTS_JSON, RESULTS_MARKDOWN, write_report
from moetrain.run.stage import stage_folder

_PLAIN_WIDTH = 120


def main(run: ReportRun) -> int:
    """Write the report of the run `run.folder/run.name`, print its tables and the paths of the files; return 0."""
    found = read_run(run.run.path.parent, run.report.stages)
    with stage_folder(run) as folder:
        write_report(found, run.report, folder=folder)
    print_tables(found, run.run.path)
    return 0


def print_stored_report(run: ReportRun) -> None:
    """Print the tables of a report that already exists, without writing it again."""
    print_tables(read_run(run.run.path.parent, run.report.stages), run.run.path)


def print_tables(found: Run, folder: Path) -> None:
    """Print the tables of a run, and the paths of its report (in `folder`) and of its exports."""
    console = Console()
    show(tables(found), console if console.is_terminal else Console(width=_PLAIN_WIDTH))
    print()
    if found.unfinished:
        print(f"not finished: {', '.join(found.unfinished)}")
    print(f"report    {folder / PAGE}")
    print(f"numbers   {folder / RESULTS_JSON}, {folder / RESULTS_MARKDOWN}")
    for stage in found.of_kind(Kind.export):
        if stage.export:
            print(f"export    {stage.folder / 'model'}")
