"""`moetrain bench train`: times training steps of moetrain and its peers in turn, so that noise affects all alike.

Each contestant runs in its own processes, one per rank, which sleep during the turns of the others.
"""

import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from moetrain.bench.contestant import Contestant, Kind, Remote
from moetrain.bench.gpu import check_peers
from moetrain.bench.spread import contestant_text, spread, spread_text
from moetrain.commands.bench import BenchTrainRun, Peer
from moetrain.errors import MoetrainError
from moetrain.kernels.choice import find
from moetrain.model.flops import flops_per_token, num_parameters
from moetrain.runtime import default_device
from moetrain.train.peak import measure_peak

_KINDS = {
    Peer.transformers_eager: Kind.transformers_eager,
    Peer.transformers_grouped_mm: Kind.transformers_grouped_mm,
    Peer.deepspeed_autoep: Kind.deepspeed_autoep,
}


def contestants(run: BenchTrainRun, *, threads: int) -> list[Contestant]:
    """Return all contestants. moetrain on DeepSpeed with one rank comes first; the ratios refer to it.

    threads: total threads per contestant.
    """
    alone = {"ranks": 1, "threads": threads, "expert": 1}
    kinds = [Kind.moetrain, Kind.moetrain_torch, *(_KINDS[peer] for peer in run.peers)]
    found = [Contestant(kind=kind, **alone) for kind in kinds]
    if run.ranks > 1:
        shared = {"ranks": run.ranks, "threads": threads // run.ranks}
        found.append(Contestant(kind=Kind.moetrain, expert=run.ranks, **shared))
        found.append(Contestant(kind=Kind.moetrain, expert=1, **shared))
        if Peer.deepspeed_autoep in run.peers:
            found.append(Contestant(kind=Kind.deepspeed_autoep, expert=run.ranks, **shared))
    return found


def bench_train(run: BenchTrainRun, *, folder: Path) -> dict[str, Any]:
    """Return all measurements as plain values for JSON.

    folder: contains config.yaml; one log file per contestant is written there. Raises `MoetrainError` if a moetrain
    contestant fails; for a peer that fails, the report contains the failure.
    """
    device = default_device()
    check_peers(device, run.peers)
    threads = run.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    library, _ = find(run.kernels)
    remotes = [
        Remote(contestant, config=folder / "config.yaml", log=folder / f"{contestant.name.replace(' ', '_')}.log")
        for contestant in contestants(run, threads=threads)
    ]
    try:
        for remote in remotes:
            remote.ask("prepare")  # one after the other, because peers time their attention implementations
        peaks = []
        for turn in range(run.repetitions):
            peaks.append(measure_peak(dtype=torch.bfloat16, device=device, library=library))
            start = turn % len(remotes)
            for remote in remotes[start:] + remotes[:start]:
                remote.ask("turn")
        profile = remotes[0].ask("profile") if run.profile_steps else None
        return _report(run, remotes, peaks=peaks, profile=profile)
    finally:
        for remote in remotes:
            remote.close()


def _report(
    run: BenchTrainRun, remotes: Sequence[Remote], *, peaks: Sequence[float], profile: Mapping[str, Any] | None
) -> dict[str, Any]:
    flops = flops_per_token(run.model, run.seq_len)
    tokens = run.steps * run.rows * run.seq_len
    ours, rows = remotes[0], []
    for remote in remotes:
        if remote.failure is not None and remote.contestant.kind in (Kind.moetrain, Kind.moetrain_torch):
            raise MoetrainError(f"{remote.contestant.name} failed: {remote.failure}; see {remote.log}")
        rates = [tokens / sum(seconds) for seconds in remote.seconds]
        ratios = [sum(theirs) / sum(own) for theirs, own in zip(remote.seconds, ours.seconds, strict=False)]
        rows.append(
            {
                **remote.contestant.as_dict(),
                "name": remote.contestant.name,
                "setting": remote.setting,
                "failure": remote.failure,
                "seconds_of_steps": remote.seconds,
                "tokens_per_s": spread(rates) if rates else None,
                "ours_over_it": spread(ratios) if ratios else None,
                "share_of_peak": statistics.median(rates) * flops / max(peaks) if rates else None,
                "losses": remote.losses,
                "memory_bytes": remote.memory,
            }
        )
    return {
        "parameters": num_parameters(run.model).total,
        "flops_per_token": flops,
        "tokens_per_step": run.rows * run.seq_len,
        "peak_flops": max(peaks),
        "peaks_flops": list(peaks),
        "torch": torch.__version__,
        "rows": rows,
        "profile": profile,
    }


def render(report: Mapping[str, Any]) -> Iterator[Table]:
    """Yield the tables of a report: the speed of each contestant, and moetrain's time per part of the model."""
    table = Table(
        *(
            "contestant",
            "ranks x threads",
            "tokens/s (min - max)",
            "ours / it (min - max)",
            "of peak",
            "first, last warm-up loss",
        ),
        title=f"{report['parameters']:,} parameters, {report['tokens_per_step']:,} tokens per step, "
        f"{report['flops_per_token'] / 1e6:.1f} MFLOPs per token; bf16 peak {report['peak_flops'] / 1e9:.0f} GFLOP/s",
    )
    for row in report["rows"]:
        layout = f"{row['ranks']} x {row['threads']}"
        if row["failure"] is not None:
            table.add_row(row["name"], layout, f"failed: {row['failure']}", "-", "-", "-")
            continue
        losses = row["losses"]
        table.add_row(
            contestant_text(row),
            layout,
            spread_text(row["tokens_per_s"], digits=0),
            spread_text(row["ours_over_it"], digits=2),
            f"{row['share_of_peak']:.1%}",
            f"{losses[0]:.4f}, {losses[-1]:.4f}",
        )
    yield table
    if report["profile"] is not None:
        parts = Table("part", "ms per step", "share", title=f"time of {report['rows'][0]['name']} by part of the model")
        total = sum(report["profile"].values())
        for part, seconds in sorted(report["profile"].items(), key=lambda item: -item[1]):
            parts.add_row(part, f"{seconds * 1e3:.1f}", f"{seconds / total:.1%}")
        yield parts
