"""`moetrain verify exports`."""

from rich.console import Console

from moetrain.commands import VerifyExportsRun
from moetrain.config import check_length
from moetrain.errors import CheckpointError, ConfigError
from moetrain.run.stage import stage_folder


def main(run: VerifyExportsRun) -> int:
    """Compare an export with its masters and print the table; return 0, or raise `BoundError` if a bound is missed."""
    if run.init_from is None or run.masters is None:
        raise ConfigError("give init_from, the export, and masters, the stage or checkpoint that it was made from")
    # These imports load torch, so they wait until the input has been checked.
    from moetrain.export.gguf_file import is_gguf
    from moetrain.export.read import is_export
    from moetrain.run.weights import read_masters, read_weights
    from moetrain.verify.exports import ExportFault, verify_exports
    from moetrain.verify.gguf import verify_gguf
    from moetrain.verify.table import check_rows, render, write_rows

    with stage_folder(run) as folder:
        export = read_weights(run.init_from)
        if not is_export(export.path):
            raise CheckpointError(f"init_from is {run.init_from}: not an export; give the folder of an export stage")
        check_length(export.model, name="num_tokens", length=run.num_tokens)
        masters = read_masters(run.masters, field="masters", origin=export).tensors
        sizes = {"seed": run.run.seed, "num_rows": run.num_rows, "num_tokens": run.num_tokens}
        fault = ExportFault(run.fault)
        if is_gguf(export.path):
            verified = verify_gguf(export.path, masters=masters, llama_python=run.llama_python, fault=fault, **sizes)
            rows, skipped = verified.rows, verified.skipped
        else:
            rows = verify_exports(export.path, masters=masters, fault=fault, **sizes)
            skipped = ["llama.cpp: it reads GGUF (export.format=gguf)", "vllm: this command does not run it"]
        context = {"export": str(export.path), "masters": run.masters, "skipped": skipped}
        write_rows(folder / "verify.json", rows=rows, context=context)
        Console().print(render(f"exports: {export.path}", rows=rows))
        for reason in skipped:
            Console().print(f"skipped: {reason}", markup=False, highlight=False)
    check_rows(rows)
    return 0
