"""`moetrain verify hf`."""

from rich.console import Console

from moetrain.commands.verify import VerifyHfRun
from moetrain.files import user_path
from moetrain.run.stage import stage_folder
from moetrain.stage_files import VERIFICATION


def main(run: VerifyHfRun) -> int:
    """Compare our logits with transformers' and print the table; return 0, or raise `BoundError` for a missed bound."""
    # These imports load torch, so they wait until the input has been checked.
    from moetrain.run.weights import EXPORT
    from moetrain.verify.hf import verify_folder, verify_matrix
    from moetrain.verify.table import check_rows, render, write_rows

    with stage_folder(run) as folder:
        sizes = {"seed": run.run.seed, "num_rows": run.num_rows, "num_tokens": run.num_tokens}
        if run.init_from is None:
            subject = "tiny random models"
            rows = list(verify_matrix(**sizes, fault=run.fault))
        else:
            subject = run.init_from
            path = user_path(run.init_from)
            rows = [verify_folder(path / EXPORT if (path / EXPORT).is_dir() else path, **sizes, fault=run.fault)]
        write_rows(folder / VERIFICATION, rows=rows, context={"of": subject})
        Console().print(render(f"fp32 logits, ours against transformers': {subject}", rows=rows))
    check_rows(rows)
    return 0
