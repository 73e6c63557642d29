"""`moetrain bench decode`: times generation of moetrain and its peers in turn, from one random model.

Every contestant reads the same weights from a folder in its own format, gets the same prompts, and decodes in turn with
the others, so that noise affects all alike. The floor is the time to read a step's bytes at the bandwidth measured in
the same call.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from moetrain.bench.decode_weights import write_weights
from moetrain.bench.process import Process
from moetrain.bench.spread import spread
from moetrain.errors import MoetrainError
from moetrain.generation_commands import BenchDecodeRun, DecodeCase, DecodePeer
from moetrain.model.config import ModelConfig
from moetrain.model.flops import expert_parameters, num_parameters

OURS, OURS_BF16 = "moetrain int4", "moetrain bf16"
_BYTES_BF16 = 2
_BYTES_INT4 = 4.5 / 8  # codes, and one bf16 scale per 32
_BANDWIDTH_BYTES = 1 << 29
_BANDWIDTH_TRIES = 5


def bytes_per_step(model: ModelConfig, case: DecodeCase, *, expert_bytes: float) -> float:
    """Return the least bytes that a decoding step reads: weights used by any sequence, and the latent KV caches.

    expert_bytes: bytes per weight of a routed expert; all others are in bf16. Expects uniform routing: of E experts, a
    batch of B tokens that choose K each reads E (1 - (1 - K/E)^B).
    """
    counts = num_parameters(model)
    chosen = model.num_experts_per_token / model.num_experts
    distinct = model.num_experts * (1 - (1 - chosen) ** case.batch)
    of_experts = model.num_moe_layers * expert_parameters(model)
    rest = counts.active_with_head - model.num_experts_per_token * of_experts
    cache = case.batch * case.context * model.num_layers * (model.kv_lora_rank + model.qk_rope_head_dim)
    return _BYTES_BF16 * (rest + cache) + expert_bytes * distinct * of_experts


def measure_bandwidth(*, threads: int) -> float:
    """Return the best read bandwidth in bytes per second of a product of a 512 MB matrix with a vector."""
    torch.set_num_threads(threads)
    side = 1 << 13
    matrix = torch.ones(_BANDWIDTH_BYTES // 4 // side, side)
    vector = torch.ones(side)
    seconds = []
    for _ in range(_BANDWIDTH_TRIES):
        start = time.perf_counter()
        torch.mv(matrix, vector)
        seconds.append(time.perf_counter() - start)
    return matrix.nbytes / min(seconds)


class _Contestant:
    """A program that generates. After a failure, `failure` holds the reason and `ask` returns None."""

    def __init__(self, name: str, words: Sequence[str], *, threads: int, folder: Path) -> None:
        self.name = name
        self.setting = ""
        self.failure: str | None = None
        log = folder / f"{name.replace(' ', '_')}.log"
        self._process = Process(words, env={"OMP_NUM_THREADS": str(threads)}, log=log)

    def ask(self, **command: Any) -> float | None:
        """Run one command of `decode_worker`; return its seconds."""
        if self.failure is not None:
            return None
        try:
            self._process.send(json.dumps(command))
            answer = self._process.receive()
        except (BrokenPipeError, EOFError):
            self.failure = self._process.last_words()
            return None
        self.setting = answer["setting"]
        return float(answer["seconds"])

    def close(self) -> None:
        """End the process."""
        self._process.close()


def bench_decode(run: BenchDecodeRun, *, folder: Path) -> dict[str, Any]:
    """Return all measurements as plain values for JSON.

    folder: contains config.yaml; weights and one log file per contestant are written there. Raises `MoetrainError` if
    moetrain itself fails; for a peer that fails, the report contains the failure.
    """
    threads = run.threads or len(os.sched_getaffinity(0))
    weights = write_weights(run, folder=folder / "weights")
    contestants = [
        _Contestant(name, words, threads=threads, folder=folder)
        for name, words in _words(run, folder=folder, weights=weights, threads=threads)
    ]
    try:
        cases = [_case(run, case, contestants, threads=threads) for case in run.cases]
    finally:
        for contestant in contestants:
            contestant.close()
    return {
        "parameters": asdict(num_parameters(run.model)),
        "threads": threads,
        "torch": torch.__version__,
        "cases": cases,
    }


def _words(
    run: BenchDecodeRun, *, folder: Path, weights: Mapping[str, Path], threads: int
) -> Iterator[tuple[str, list[str]]]:
    """Yield name and command line of each contestant; moetrain with INT4 experts comes first."""
    worker = [sys.executable, "-m", "moetrain.bench.decode_worker"]
    yield OURS, [*worker, "moetrain", str(weights["int4"]), str(threads)]
    yield OURS_BF16, [*worker, "moetrain", str(weights["bf16"]), str(threads)]
    if DecodePeer.transformers in run.peers:
        yield "transformers bf16", [*worker, "transformers", str(weights["bf16"]), str(threads)]


def _case(run: BenchDecodeRun, case: DecodeCase, contestants: Sequence[_Contestant], *, threads: int) -> dict[str, Any]:
    """Measure one case on all contestants, in turn."""
    limit = case.context + 2 + (run.repetitions + 1) * run.steps
    begin = {"do": "begin", "batch": case.batch, "context": case.context, "limit": limit, "seed": run.run.seed}
    prefill = {contestant.name: contestant.ask(**begin) for contestant in contestants}
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for contestant in contestants:
        contestant.ask(do="decode", steps=run.steps)  # refills the caches that the others used
    bandwidths = []
    for turn in range(run.repetitions):
        bandwidths.append(measure_bandwidth(threads=threads))
        start = turn % len(contestants)
        for contestant in [*contestants[start:], *contestants[:start]]:
            answer = contestant.ask(do="decode", steps=run.steps)
            if answer is not None:
                seconds[contestant.name].append(answer)
    for contestant in contestants:
        contestant.ask(do="end")
    own = seconds[OURS]
    if contestants[0].failure is not None:
        raise MoetrainError(f"{OURS} failed: {contestants[0].failure}")
    bandwidth, tokens = max(bandwidths), case.batch * run.steps
    rows = []
    for contestant in contestants:
        taken = seconds[contestant.name]
        expert_bytes = _BYTES_INT4 if contestant.name == OURS else _BYTES_BF16
        floor = bytes_per_step(run.model, case, expert_bytes=expert_bytes) / bandwidth * run.steps
        rows.append(
            {
                "name": contestant.name,
                "setting": contestant.setting,
                "failure": contestant.failure,
                "prefill_s": prefill[contestant.name],
                "seconds": taken,
                "tokens_per_s": spread([tokens / each for each in taken]) if taken else None,
                "ours_over_it": spread([a / b for a, b in zip(taken, own, strict=True)]) if taken else None,
                "share_of_floor": floor / statistics.median(taken) if taken else None,
            }
        )
    return {"batch": case.batch, "context": case.context, "bandwidth": bandwidth, "rows": rows}


def render(report: Mapping[str, Any]) -> Iterator[Table]:
    """Yield one table per case."""
    for case in report["cases"]:
        table = Table(
            "contestant",
            "prefill s",
            "tokens/s (min - max)",
            "ours / it (min - max)",
            "of the byte floor",
            title=f"{report['parameters']['total']:,} parameters; {case['batch']} x {case['context']:,} tokens; "
            f"{report['threads']} threads; bandwidth {case['bandwidth'] / 1e9:.1f} GB/s",
        )
        for row in case["rows"]:
            name = f"{row['name']} ({row['setting']})" if row["setting"] else row["name"]
            if row["failure"] is not None or not row["seconds"]:
                table.add_row(name, f"failed: {row['failure']}", "-", "-", "-")
                continue
            rate, ratio = row["tokens_per_s"], row["ours_over_it"]
            table.add_row(
                name,
                f"{row['prefill_s']:.2f}",
                f"{rate['median']:,.1f} ({rate['min']:,.1f} - {rate['max']:,.1f})",
                f"{ratio['median']:.2f} ({ratio['min']:.2f} - {ratio['max']:.2f})",
                f"{row['share_of_floor']:.0%}",
            )
        yield table
