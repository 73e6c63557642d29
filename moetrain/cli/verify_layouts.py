"""`moetrain verify layouts`."""

from rich.console import Console

from moetrain.commands.verify import VerifyLayoutsRun
from moetrain.run.stage import stage_folder
from moetrain.stage_files import VERIFICATION

_WIDTH = 150  # of the table in characters, also when the output is not a terminal


def main(run: VerifyLayoutsRun) -> int:
    """Compare every layout with the plain loop and print the table; return 0, or raise `BoundError`."""
    # These imports load torch, so they wait until the input has been checked.
    from moetrain.verify.layouts import rows_of, verify_layouts
    from moetrain.verify.table import check_rows, render, write_rows

    with stage_folder(run) as folder:
        outcome = verify_layouts(run, folder=folder)
        rows = rows_of(outcome)
        margins = [
            f"{name} {ref.margin:.1e} (decided by rounding below {ref.coin_flip:.1e})"
            for name, ref in outcome.references.items()
        ]
        flips = [
            f"{name}: {ref.num_coin_flips} token draws"
            for name, ref in outcome.references.items()
            if ref.num_coin_flips
        ]
        counted = f"{len(outcome.gaps)} layouts compared, {len(outcome.left_out)} left out (rounding decides routing)"
        counted += f" ({', '.join(flips)})" if flips else ""
        context = {
            "layouts": counted,
            "margins": "; ".join(margins),
            "fault": str(run.fault),
            "gaps": {layout.name: gaps for layout, gaps in outcome.gaps.items()},
        }
        write_rows(folder / VERIFICATION, rows=rows, context=context)
        console = Console(width=_WIDTH)
        console.print(f"smallest margin of a chosen expert: {'; '.join(margins)}", highlight=False)
        console.print(render(f"layouts: {counted}", rows=rows))
    check_rows(rows)
    return 0
