"""`moetrain verify faults`."""

from rich.console import Console

from moetrain.commands.verify import VerifyFaultsRun
from moetrain.run import recipe
from moetrain.run.stage import stage_folder
from moetrain.stage_files import VERIFICATION


def main(run: VerifyFaultsRun) -> int:
    """Disturb real runs with faults and print the table; return 0, or raise `BoundError` if a bound is missed."""
    from moetrain.verify.faults import Request, verify_faults
    from moetrain.verify.table import check_rows, render, write_rows

    if run.recipe_kills:
        recipe.load(run.recipe)  # a wrong name is reported before the runs, and not after ten minutes
    with stage_folder(run) as folder:
        request = Request(
            model=run.model,
            kills=run.kills,
            collection_kills=run.collection_kills,
            recipe=run.recipe,
            recipe_kills=run.recipe_kills,
            ranks=run.ranks,
            with_others=run.others,
            overrides=tuple(run.overrides),
            planted=run.fault,
            seed=run.run.seed,
        )
        rows = verify_faults(folder, request)
        names = ("model", "kills", "collection_kills", "recipe", "recipe_kills", "ranks", "fault")
        context = {name: str(vars(run)[name]) for name in names}
        write_rows(folder / VERIFICATION, rows=rows, context=context)
        Console().print(render(f"faults: {run.model}, {run.kills} kills", rows=rows))
    check_rows(rows)
    return 0
