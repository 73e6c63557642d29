"""`moetrain upcycle`."""

from dataclasses import asdict

from rich.console import Console

from moetrain.commands.weights import UpcycleRun
from moetrain.compose import to_mapping
from moetrain.errors import ConfigError
from moetrain.files import write_json
from moetrain.model.flops import num_parameters
from moetrain.run.record import config_changes
from moetrain.run.stage import has_results, stage_folder
from moetrain.stage_files import SUMMARY, VERIFICATION
from moetrain.upcycle.config import plan_upcycling
from moetrain.verify.table import Row, check_rows, render, write_rows

RELATIVE_BOUND = 1e-5
"""Bound on the change of a layer's outputs, relative to its largest output: a few float32 rounding errors."""
_DETERMINE = ("model.", "upcycle.", "run.seed", "init_from")
"""Beginnings of the keys that determine the weights."""
TIES_BOUND = 0.01
"""Bound on the share of tokens whose top-k choice splits tied copies; at random a few per million
(docs/upcycling.md)."""


def main(run: UpcycleRun) -> int:
    """Run the stage; return its exit code. Writes no weights and raises `BoundError` if a layer's output changes."""
    weights = run.require_weights()
    plan = plan_upcycling(run.model, run.upcycle)
    # These imports load torch, so they wait until the input has been checked.
    from moetrain.run.weights import read_weights
    from moetrain.upcycle.stage import check_untrained, upcycle, write_upcycled

    with stage_folder(run) as folder:
        check_untrained(folder)
        if differences := has_results(folder) and config_changes(folder, to_mapping(run), keys=_DETERMINE):
            raise ConfigError(
                f"{folder} has weights of another configuration ({'; '.join(differences)}), which would be replaced: "
                "give another run.stage or run.name"
            )
        origin = read_weights(weights)
        upcycling = upcycle(origin, model=run.model, config=run.upcycle, plan=plan, seed=run.run.seed)
        rows: list[Row] = []
        for layer, change in upcycling.changes.items():
            ties, cut = change.num_cut / run.upcycle.check_tokens, f"layer {layer}, tokens whose choice cuts a copy"
            rows += [
                Row(name=f"layer {layer}, change of the output", value=change.relative, bound=RELATIVE_BOUND),
                Row(name=cut, value=ties, bound=TIES_BOUND, note=f"share of {run.upcycle.check_tokens}"),
            ]
        write_rows(folder / VERIFICATION, rows=rows, context={"dense": str(origin.path)})
        Console().print(render(f"{origin.path}: {plan.num_copies} copies of {plan.num_shards} shards", rows=rows))
        check_rows(rows)
        write_upcycled(upcycling, folder)
        counts = {"dense": asdict(num_parameters(origin.model)), "sparse": asdict(num_parameters(run.model))}
        write_json(folder / SUMMARY, {"stage": folder.name, "parameters": counts, "plan": asdict(plan)})
    return 0
