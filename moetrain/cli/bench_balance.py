"""`moetrain bench balance`."""

from rich.console import Console

from moetrain.commands.bench import BenchBalanceRun
from moetrain.run.stage import stage_folder


def main(run: BenchBalanceRun) -> int:
    """Train with every method, print the table and write it to `balance.json` in the stage folder; return 0."""
    # These imports load torch, so they wait until the input has been checked.
    from moetrain.bench.balance import bench_balance, render, write_results
    from moetrain.log import progress
    from moetrain.run.document_stage import document_data

    with stage_folder(run) as folder:
        sections, data, topology = document_data(run, folder)
        with progress(run.train.steps, folder.name, completed=0) as advance:
            results = bench_balance(sections, run.methods, data=data, tail_share=run.tail_share, on_step=advance)
        if topology.is_main:
            tokens = run.train.rows_before(run.train.steps) * run.data.seq_len
            write_results(folder / "balance.json", results, context={"steps": run.train.steps, "tokens": tokens})
            Console(width=180).print(render(results))
    return 0
