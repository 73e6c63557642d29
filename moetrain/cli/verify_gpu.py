"""`moetrain verify gpu`."""

from rich.console import Console

from moetrain.commands.verify import VerifyGpuRun
from moetrain.run.stage import stage_folder
from moetrain.stage_files import VERIFICATION

_WIDTH = 160  # of the table in characters, also when the output is not a terminal


def main(run: VerifyGpuRun) -> int:
    """Run all parts, print the table and write verify.json; return 0, or raise `BoundError`.

    Raises ConfigError before anything is written if this machine has no GPU.
    """
    # These imports load torch, so they wait until the input has been checked.
    from moetrain.verify.gpu import check_gpu, describe_gpu, verify_gpu
    from moetrain.verify.table import check_rows, render, write_rows

    check_gpu()
    console = Console(width=_WIDTH)
    with stage_folder(run) as folder:
        context = describe_gpu()
        rows = []
        for row in verify_gpu(run, folder=folder):
            rows.append(row)
            write_rows(folder / VERIFICATION, rows=rows, context=context)
            if not row.is_kept:
                console.print(f"{row.name}: {row.note}", markup=False, highlight=False)
        console.print(render(f"{context['gpu']}, torch {context['torch']}", rows=rows))
        console.print(f"{folder / 'verify.json'}", markup=False, highlight=False)
    check_rows(rows)
    return 0
