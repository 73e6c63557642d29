"""`moetrain export`."""

from dataclasses import asdict

from moetrain.commands.weights import ExportRun
from moetrain.export.config import exported_quant
from moetrain.files import write_json
from moetrain.run.stage import stage_folder
from moetrain.stage_files import SUMMARY


def main(run: ExportRun) -> int:
    """Run the stage; return its exit code."""
    weights = run.require_weights()
    # These imports load torch, so they wait until the input has been checked.
    from moetrain.export.write import export_model
    from moetrain.run.trained_context import trained_context
    from moetrain.run.weights import EXPORT, check_export, read_weights, tokenizer_of

    with stage_folder(run) as folder:
        origin = read_weights(weights)
        check_export(origin, run.export)
        report = export_model(
            origin.reader,
            codes=origin.codes,
            folder=folder / EXPORT,
            model=origin.model,
            quant=exported_quant(origin.quant, given=run.quant),
            export=run.export,
            tokenizer=tokenizer_of(origin),
            step=origin.step,
            sources={"weights": origin.digest},
            context=trained_context(origin),
        )
        write_json(folder / SUMMARY, {"stage": "export", **asdict(report)})
    return 0
