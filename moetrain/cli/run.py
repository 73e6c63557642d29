"""`moetrain run`: runs the stages of a recipe and prints the status and time of each."""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moetrain.cli import report
from moetrain.commands.recipe import ReportRun
from moetrain.errors import ConfigError
from moetrain.log import duration
from moetrain.run import dry_run
from moetrain.run.runner import Row, prepare, run_stages


def main(words: Sequence[str]) -> int:
    """Run the recipe named on the command line; return the exit code of the stage that failed, or 0."""
    prepared = prepare(words)
    if prepared.run.dry_run:
        for stage in prepared.stages:
            dry_run.show(
                stage.name,
                stage.config,
                world_size=stage.processes,
                device_tflops=prepared.run.device_tflops,
            )
        return 0
    ran = run_stages(prepared)
    for stage in prepared.stages[: ran.num_unchanged]:
        if isinstance(stage.config, ReportRun):
            report.print_stored_report(stage.config)
    _print_table(ran.rows, prepared.folder)
    if ran.code:
        again, failed = prepared.run.again_from, ran.rows[-1].stage
        how = "run the same command" + (f" without again_from={again}" if again else "")
        aim = "repeat" if ran.is_restored else "resume"
        if again and ran.is_restored:
            how = f"run the same command with again_from={failed}"
        if ran.code == ConfigError.exit_code:
            how = f"correct what its error line names, and {how}"
        print(
            f"moetrain: stage {failed} ended with exit code {ran.code}; {how} to {aim} it",
            file=sys.stderr,
        )
    return ran.code


def _print_table(rows: Sequence[Row], folder: Path) -> None:
    table = Table(title=str(folder), title_justify="left")
    table.add_column("stage")
    table.add_column("status")
    table.add_column("time", justify="right")
    for row in rows:
        table.add_row(row.stage, row.status, duration(row.seconds))
    ran = sum(row.seconds for row in rows if row.status != "unchanged")
    table.add_row("all", "this time", duration(ran), style="bold")
    Console().print(table)
