"""`moetrain bench decode`: times generation of moetrain and its peers in turn, from one random model.

Every contestant reads the same weights from a folder in its own format, gets the same prompts, and decodes in turn with
the others, so that noise affects all alike. The floor is the time to read a step's bytes at the bandwidth measured in
the same call.
"""

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from rich.table import Table

from moetrain.bench.contestants import Contestant, entries, notes, started, summary, take_turns
from moetrain.bench.engines.protocol import EngineSettings
from moetrain.bench.generation_weights import random_weights, write_weights
from moetrain.bench.gpu import check_peers
from moetrain.bench.spread import contestant_text, spread_text
from moetrain.commands.bench_generation import BenchDecodeRun, DecodeCase
from moetrain.data.config import MIN_VOCAB_SIZE
from moetrain.data.tokenizer import train_tokenizer
from moetrain.export.config import ExportFormat
from moetrain.kernels.memory import Memory
from moetrain.log import progress
from moetrain.model.config import ModelConfig
from moetrain.model.flops import expert_parameters, num_parameters
from moetrain.runtime import default_device

_TEXT = "the quick brown fox jumps over the lazy dog"
_NUM_MERGES = 2  # llama.cpp refuses a tokenizer without any
_BYTES_BF16 = 2
_BYTES_INT4 = 4.5 / 8  # codes, and one scale of 16 bits per 32; in Q4_0 too
_BANDWIDTH_BYTES = 1 << 29
_BANDWIDTH_TRIES = 5
_OTHER_TURNS = 4  # of a case beside the measured ones: choose a setting, read the prompts, refill caches, end


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


def measure_bandwidth(device: torch.device, *, threads: int) -> float:
    """Return the best read bandwidth in bytes per second of a sum over 512 MB in float32.

    A sum takes one addition per number. A product with a vector is bound by arithmetic on some CPUs. On a CPU the
    numbers lie in pages of 2 MB, as the weights do.
    """
    torch.set_num_threads(threads)
    count = _BANDWIDTH_BYTES // 4
    numbers = Memory().zeros(count, dtype=torch.float32) if device.type == "cpu" else torch.empty(count, device=device)
    numbers.fill_(1)
    seconds = []
    for _ in range(_BANDWIDTH_TRIES):
        start = time.perf_counter()
        numbers.sum()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return numbers.nbytes / min(seconds)


def bench_decode(run: BenchDecodeRun, *, folder: Path) -> dict[str, Any]:
    """Return all measurements as plain values for JSON.

    Weights and one log file per contestant are written to `folder`. Raises `MoetrainError` if moetrain itself fails;
    for a peer that fails or is not installed, the report contains the reason.
    """
    check_peers(default_device(), run.peers)
    threads = run.threads or len(os.sched_getaffinity(0))
    settings = EngineSettings(
        threads=threads,
        mode="",
        max_sequences=max(case.batch for case in run.cases),
        max_tokens=max(run.limit(case) for case in run.cases),
    )
    found = entries(
        run.peers,
        model=run.model,
        quant=run.quant,
        settings=settings,
        num_cached=max(case.batch * run.limit(case) for case in run.cases),
        llama_python=run.llama_python,
        vllm_python=run.vllm_python,
    )
    weights = write_weights(
        random_weights(run.model, seed=run.run.seed),
        folder=folder / "weights",
        formats=[entry.format for entry in found if not entry.absent],
        model=run.model,
        quant=run.quant,
        tokenizer=train_tokenizer([_TEXT], vocab_size=min(MIN_VOCAB_SIZE + _NUM_MERGES, run.model.vocab_size)),
        sources={"weights": f"random, seed {run.run.seed}"},
    )
    with started(found, folder=folder, weights=weights, settings=settings) as contestants:
        packed = {entry.name for entry in found if entry.format is not ExportFormat.bf16_dequantized}
        turns = len(run.cases) * (_OTHER_TURNS + run.repetitions)
        with progress(turns * len(contestants), "bench decode") as advance:
            cases = [
                _case(run, case, contestants, packed=packed, threads=threads, advance=advance) for case in run.cases
            ]
    return {
        "parameters": asdict(num_parameters(run.model)),
        "threads": threads,
        "torch": torch.__version__,
        "cases": cases,
        "absent": {entry.name: entry.absent for entry in found if entry.absent},
    }


def random_prompts(batch: int, context: int, *, vocab_size: int, seed: int) -> list[list[int]]:
    """Return prompts of random tokens that share no prefix."""
    stream = random.Random(seed)
    return [[stream.randrange(vocab_size) for _ in range(context)] for _ in range(batch)]


def _case(
    run: BenchDecodeRun,
    case: DecodeCase,
    contestants: Sequence[Contestant],
    *,
    packed: set[str],
    threads: int,
    advance: Callable[[str], None],
) -> dict[str, Any]:
    """Measure one case on all contestants, in turn. packed: names of the contestants whose experts have 4.5 bits."""

    def note(name: str) -> None:
        advance(f"{case.batch} x {case.context} tokens, {name}")

    prompts = random_prompts(case.batch, case.context, vocab_size=run.model.vocab_size, seed=run.run.seed)
    limit = run.limit(case)
    for contestant in contestants:
        contestant.ask(do="choose", prompts=prompts, limit=limit)
        note(contestant.name)
    begun = take_turns(contestants, {"do": "begin", "prompts": prompts, "limit": limit}, repetitions=1, advance=note)
    decode = {"do": "decode", "steps": run.steps}
    take_turns(contestants, decode, repetitions=1, advance=note)  # refills the caches that the others used
    bandwidths: list[float] = []
    seconds = take_turns(
        contestants,
        decode,
        repetitions=run.repetitions,
        before_turn=lambda: bandwidths.append(measure_bandwidth(default_device(), threads=threads)),
        advance=note,
    )
    take_turns(contestants, {"do": "end"}, repetitions=1, advance=note)
    bandwidth = max(bandwidths)
    rows = summary(contestants, seconds, amount=case.batch * run.steps)
    for row in rows:
        expert_bytes = _BYTES_INT4 if row["name"] in packed else _BYTES_BF16
        floor = bytes_per_step(run.model, case, expert_bytes=expert_bytes) / bandwidth * run.steps
        row["tokens_per_s"] = row.pop("rate")
        row["prefill_s"] = begun[row["name"]][0] if begun[row["name"]] else None
        row["share_of_floor"] = floor / row["median_s"] if row["seconds"] else None
    return {"batch": case.batch, "context": case.context, "bandwidth": bandwidth, "rows": rows}


def render(report: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Yield one table per case, and one line per contestant that is missing from them."""
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
            if row["failure"] is not None:
                table.add_row(contestant_text(row), "failed", "-", "-", "-")
                continue
            table.add_row(
                contestant_text(row),
                f"{row['prefill_s']:.2f}",
                spread_text(row["tokens_per_s"], digits=1),
                spread_text(row["ours_over_it"], digits=2),
                f"{row['share_of_floor']:.0%}",
            )
        yield table
    yield from notes(report["cases"][-1]["rows"], absent=report["absent"])
