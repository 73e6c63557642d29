"""`moetrain verify rollout`."""

from rich.console import Console

from moetrain.commands.verify import VerifyRolloutRun
from moetrain.run.stage import stage_folder
from moetrain.stage_files import VERIFICATION

_WIDTH = 130  # width of the table in characters, also when the output is not a terminal


def main(run: VerifyRolloutRun) -> int:
    """Compare tokens and logprobs in different batches, print the table; return 0, or raise `BoundError`."""
    # These imports load torch, so they wait until the input has been checked.
    from moetrain.verify.rollout import verify_rollout
    from moetrain.verify.table import check_rows, render, write_rows

    with stage_folder(run) as folder:
        rows = list(verify_rollout(run))
        write_rows(folder / VERIFICATION, rows=rows, context={"of": "tiny random models"})
        Console(width=_WIDTH).print(render("generation: tokens and logprobs, bit for bit", rows=rows))
    check_rows(rows)
    return 0
