"""`moetrain bench optimizers`."""

from rich.console import Console

from moetrain.commands.bench import BenchOptimizersRun
from moetrain.optim.config import OptimizerName
from moetrain.run.stage import stage_folder


def main(run: BenchOptimizersRun) -> int:
    """Train with every optimizer and rate, write `optimizers.json` and `optimizers.html`, print the table; return 0."""
    # These imports load torch, so they wait until the input has been checked.
    from moetrain.bench.optimizers import bench_optimizers, picture, render, sentence, write_results
    from moetrain.log import progress
    from moetrain.run.document_stage import document_data

    rates = {OptimizerName.muon: run.muon_rates, OptimizerName.adamw: run.adamw_rates}
    num_runs = len(run.muon_rates) + len(run.adamw_rates) + 2
    with stage_folder(run) as folder:
        sections, data, topology = document_data(run, folder)
        with progress(num_runs * run.train.steps, folder.name, completed=0) as advance:
            comparison = bench_optimizers(
                sections,
                rates,
                clip_rate=run.clip_rate,
                threshold=run.clip_threshold,
                data=data,
                on_step=advance,
            )
        if topology.is_main:
            tokens = run.train.rows_before(run.train.steps) * run.data.seq_len
            context = {"steps": run.train.steps, "tokens": tokens}
            write_results(folder / "optimizers.json", comparison, context=context)
            (folder / "optimizers.html").write_text(picture(comparison), encoding="utf-8")
            console = Console(width=120)
            console.print(sentence(comparison))
            console.print(render(comparison))
    return 0
