"""`moetrain verify serve`."""

import importlib.util

from rich.console import Console
from rich.table import Table

from moetrain.commands.verify import VerifyServeRun
from moetrain.errors import ConfigError
from moetrain.run.stage import stage_folder
from moetrain.stage_files import VERIFICATION


def main(run: VerifyServeRun) -> int:
    """Load a server, print the table; return 0, or raise `BoundError` for a missed bound."""
    run.require_weights()
    if importlib.util.find_spec("starlette") is None:
        raise ConfigError("starlette is not installed: install it with pip install 'moetrain[serve]'")
    # These imports load torch, so they wait until the input has been checked.
    from moetrain.kernels.choice import find_for_generation
    from moetrain.kernels.config import Kernels
    from moetrain.verify.serve import verify_serve
    from moetrain.verify.table import check_rows, render, write_rows

    same_bits = find_for_generation(Kernels.auto) is not None
    with stage_folder(run) as folder:
        rows, report = verify_serve(run, folder=folder, same_bits=same_bits)
        write_rows(folder / VERIFICATION, rows=rows, context={"of": run.init_from, **report})
        Console().print(render(f"{run.clients} clients of {run.init_from}, {run.minutes:g} minutes", rows=rows))
        table = Table("requests", "number", "ends")
        for kind, ends in report["counts"].items():
            table.add_row(kind, str(sum(ends.values())), ", ".join(f"{number} {end}" for end, number in ends.items()))
        Console().print(table)
        for name, shares in report["latencies_s"].items():
            times = ", ".join(f"{share} {1000 * seconds:.0f} ms" for share, seconds in shares.items())
            Console().print(f"{name}: {times}", highlight=False)
        Console().print(f"the server was down for {report['down_s'][0]:.1f} s", highlight=False)
    check_rows(rows)
    return 0
