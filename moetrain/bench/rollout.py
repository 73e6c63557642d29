"""`moetrain bench rollout`: times the generation of the same multi-turn episodes by moetrain and its peers, in turn.

Episodes are fixed before: each contestant reads the same given tokens (prompts, tool results) and generates the same
number of tokens in each turn. Environments take no time, since their results are known. Before that,
moetrain's engine alone continues one long conversation.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from rich.table import Table

from moetrain.bench.contestants import entries, notes, started, summary, take_turns
from moetrain.bench.conversation import render_conversation, time_conversation
from moetrain.bench.engines.protocol import EngineSettings, Episode, as_json, length
from moetrain.bench.episodes import collected_episodes, demonstrated_episodes
from moetrain.bench.generation_weights import random_weights, write_weights
from moetrain.bench.gpu import check_peers
from moetrain.bench.spread import contestant_text, spread_text
from moetrain.chat.registry import AUTO, template_named
from moetrain.commands.bench_generation import BenchRolloutRun
from moetrain.data.tokenizer import Tokenizer, train_tokenizer
from moetrain.export.config import ExportFormat
from moetrain.export.read import read_export
from moetrain.files import write_json
from moetrain.inference.build import build_model
from moetrain.inference.engine import GenerationEngine
from moetrain.inference.protocol import Model
from moetrain.kernels.choice import find_for_generation
from moetrain.log import progress
from moetrain.model.config import ModelConfig
from moetrain.model.flops import num_parameters
from moetrain.parallel.protocol import StateReader
from moetrain.quant.config import QuantConfig
from moetrain.runtime import default_device
from moetrain.tasks import registry
from moetrain.tasks.dialogues import dialogue_texts
from moetrain.tasks.protocol import TaskFamily

_NUM_TEXTS = 200  # demonstrations from which the tokenizer of a random model is trained


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The model that every contestant generates with.

    is_random: the weights are random, so the episodes replay demonstrations. source: where the weights come from, for
    the table.
    """

    reader: StateReader
    model: ModelConfig
    quant: QuantConfig
    tokenizer: Tokenizer
    source: str
    is_random: bool = False


def drawn_weights(run: BenchRolloutRun) -> Weights:
    """Return random weights of the shape `run.model`, with a tokenizer trained on demonstrations."""
    family, template = registry.build(run.task, run.run.seed), template_named(AUTO)
    texts = dialogue_texts(family, template=template, count=_NUM_TEXTS, seed=run.run.seed)
    return Weights(
        reader=random_weights(run.model, seed=run.run.seed),
        model=run.model,
        quant=run.quant,
        tokenizer=train_tokenizer(texts, vocab_size=run.model.vocab_size),
        source=f"random, seed {run.run.seed}",
        is_random=True,
    )


def bench_rollout(run: BenchRolloutRun, *, weights: Weights, folder: Path) -> dict[str, Any]:
    """Return all measurements as plain values for JSON.

    Weights, episodes and one log file per contestant are written to `folder`. Raises `MoetrainError` if moetrain itself
    fails; for a peer that fails or is not installed, the report contains the reason.
    """
    check_peers(default_device(), run.peers)
    threads = run.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    own = _written(weights, folder, [ExportFormat.quantized])
    episodes, conversation = _alone(run, weights, own[ExportFormat.quantized])
    write_json(folder / "episodes.json", as_json(episodes))
    settings = EngineSettings(
        threads=threads,
        mode="",
        max_sequences=len(episodes),
        max_tokens=max(length(episode) for episode in episodes),
    )
    found = entries(
        run.peers,
        model=weights.model,
        quant=weights.quant,
        settings=settings,
        num_cached=sum(length(episode) for episode in episodes),
        llama_python=run.llama_python,
        vllm_python=run.vllm_python,
    )
    formats = [entry.format for entry in found if not entry.absent and entry.format not in own]
    others = _written(weights, folder, formats)
    path = str(folder / "episodes.json")
    with started(found, folder=folder, weights=own | others, settings=settings) as contestants:
        with progress(len(contestants) * (1 + run.repetitions), "bench rollout") as advance:
            take_turns(contestants, {"do": "choose_for_replay", "episodes": path}, repetitions=1, advance=advance)
            replay = {"do": "replay", "episodes": path}
            seconds = take_turns(contestants, replay, repetitions=run.repetitions, advance=advance)
        rows = summary(contestants, seconds, amount=len(episodes))
    return {
        "parameters": asdict(num_parameters(weights.model)),
        "weights": weights.source,
        "threads": threads,
        "torch": torch.__version__,
        **_counts(episodes),
        "rows": rows,
        "absent": {entry.name: entry.absent for entry in found if entry.absent},
        "conversation_config": asdict(run.conversation),
        "conversation": conversation,
    }


def _written(weights: Weights, folder: Path, formats: Sequence[ExportFormat]) -> dict[ExportFormat, Path]:
    return write_weights(
        weights.reader,
        folder=folder / "weights",
        formats=formats,
        model=weights.model,
        quant=weights.quant,
        tokenizer=weights.tokenizer,
        sources={"weights": weights.source},
    )


def _alone(run: BenchRolloutRun, weights: Weights, export: Path) -> tuple[list[Episode], dict[str, Any] | None]:
    """Return the episodes, and the long conversation: what moetrain does alone, before the contestants start."""
    if weights.is_random and run.conversation.turns == 0:
        return _episodes(run, weights, None), None
    read = read_export(export)
    library = find_for_generation(run.rollout.kernels)
    model = build_model(read.weights(), config=read.model, quant=read.quant, library=library)
    episodes = _episodes(run, weights, model)
    if run.conversation.turns == 0:
        return episodes, None
    vocab_size = weights.model.vocab_size
    return episodes, time_conversation(model, run.conversation, vocab_size=vocab_size, seed=run.run.seed)


def _episodes(run: BenchRolloutRun, weights: Weights, model: Model | None) -> list[Episode]:
    """Return the episodes: the model's own, or demonstrations for random weights."""
    family: TaskFamily = registry.build(run.task, run.run.seed)
    sizes = {"num_episodes": run.episodes, "group_size": run.group_size, "seed": run.run.seed}
    if weights.is_random or model is None:
        return demonstrated_episodes(
            family,
            weights.tokenizer,
            max_tokens=run.rollout.max_tokens,
            declare_tools=run.task.declare_tools,
            **sizes,
        )
    engine = GenerationEngine(
        model, num_slots=run.episodes, max_tokens=run.rollout.max_tokens, speculation=run.rollout.speculation
    )
    return collected_episodes(
        family,
        weights.tokenizer,
        generation=engine,
        config=run.rollout,
        declare_tools=run.task.declare_tools,
        **sizes,
    )


def _counts(episodes: Sequence[Episode]) -> dict[str, int]:
    """Return the numbers of episodes, of turns, of all tokens, and of the tokens to generate."""
    turns = [turn for episode in episodes for turn in episode]
    return {
        "episodes": len(episodes),
        "turns": len(turns),
        "tokens": sum(length(episode) for episode in episodes),
        "new_tokens": sum(turn.num_new for turn in turns),
    }


def render(report: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Yield the table, and one line per contestant that is missing from it."""
    table = Table(
        "contestant",
        "seconds",
        "rollouts/s (min - max)",
        "new tokens/s",
        "ours / it (min - max)",
        title=f"{report['parameters']['total']:,} parameters ({report['weights']}); {report['episodes']} episodes, "
        f"{report['turns']} turns, {report['tokens']:,} tokens, {report['new_tokens']:,} of them new; "
        f"{report['threads']} threads",
    )
    for row in report["rows"]:
        if row["failure"] is not None:
            table.add_row(contestant_text(row), "failed", "-", "-", "-")
            continue
        table.add_row(
            contestant_text(row),
            f"{row['median_s']:.2f}",
            spread_text(row["rate"], digits=2),
            f"{report['new_tokens'] / row['median_s']:,.0f}",
            spread_text(row["ours_over_it"], digits=2),
        )
    yield table
    yield from notes(report["rows"], absent=report["absent"])
    if report["conversation"] is not None:
        yield from render_conversation(report["conversation"], report["conversation_config"])
