"""`moetrain verify exports`."""

from rich.console import Console

from moetrain.commands.stage import check_length
from moetrain.commands.verify import VerifyExportsRun
from moetrain.errors import ConfigError
from moetrain.run.stage import stage_folder
from moetrain.stage_files import VERIFICATION

_LLAMA = "llama.cpp: it reads GGUF; export with export.format=gguf and verify that folder"
_VLLM = (
    "vllm: on an x86 CPU it does not multiply packed experts; export with export.format=bf16_dequantized and verify "
    "that folder"
)


def main(run: VerifyExportsRun) -> int:
    """Compare an export with its masters and print the table; return 0, or raise `BoundError` if a bound is missed."""
    weights = run.require_weights()
    if run.masters is None:
        raise ConfigError("masters is null: give the stage or checkpoint from which the export was made")
    # These imports load torch, so they wait until the input has been checked.
    from moetrain.export.config import ExportFormat
    from moetrain.export.read import export_format
    from moetrain.export.tensors import folder_tensors
    from moetrain.hf.consumers import PLAIN_LAYERS, obstacles
    from moetrain.quant.consumers import Consumer
    from moetrain.run.weights import check_is_export, read_masters, read_weights, with_codes
    from moetrain.verify.bf16 import verify_bf16
    from moetrain.verify.exports import verify_exports
    from moetrain.verify.gguf import verify_gguf
    from moetrain.verify.table import check_rows, render, write_rows

    with stage_folder(run) as folder:
        export = read_weights(weights)
        check_is_export(export, given=run.init_from)
        check_length(export.model, name="num_tokens", length=run.num_tokens)
        origin = read_masters(run.masters, field="masters", origin=export)
        sizes = {"seed": run.run.seed, "num_rows": run.num_rows, "num_tokens": run.num_tokens}
        format = export_format(export.path)
        reasons = obstacles(export.model, Consumer.transformers)
        if export.codes is not None and export.codes.packed_experts().keys() != folder_tensors(export.model).experts:
            reasons.append(PLAIN_LAYERS)
        if format is not ExportFormat.gguf and reasons:
            raise ConfigError(
                f"init_from is {run.init_from}: the export is compared with transformers, which does not compute this "
                f"model ({'; '.join(reasons)})"
            )
        # An export of quantised weights keeps their codes and scales, whichever grid made them.
        has_codes = export.codes is not None or format is ExportFormat.bf16_dequantized
        masters = with_codes(origin) if has_codes else origin.tensors
        if format is ExportFormat.gguf:
            verified = verify_gguf(
                export.path, masters=masters, llama_python=run.llama_python, fault=run.fault, **sizes
            )
            rows, skipped = verified.rows, verified.skipped
        elif format is not ExportFormat.quantized:
            verified = verify_bf16(export.path, masters=masters, vllm_python=run.vllm_python, fault=run.fault, **sizes)
            rows, skipped = verified.rows, [*verified.skipped, _LLAMA]
        else:
            rows = verify_exports(export.path, masters=masters, fault=run.fault, **sizes)
            skipped = [_LLAMA, _VLLM]
        context = {"export": str(export.path), "masters": run.masters, "skipped": skipped}
        write_rows(folder / VERIFICATION, rows=rows, context=context)
        Console().print(render(f"exports: {export.path}", rows=rows))
        for reason in skipped:
            Console().print(f"skipped: {reason}", markup=False, highlight=False)
    check_rows(rows)
    return 0
