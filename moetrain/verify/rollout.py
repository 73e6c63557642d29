"""Checks that a generated token and its logprob depend on the weights and the tokens before it only.

Tiny random models generate the same sequences alone and in batches, through the same engine as rollouts. The
tokens and the bits of their logprobs must be equal; in the mode `deterministic` the logprobs must also be those of
training. In the mode `fast` the difference to training is measured and split by its causes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from moetrain.commands.verify import VerifyRolloutRun
from moetrain.errors import ConfigError
from moetrain.inference.build import build_model
from moetrain.inference.engine import GenerationEngine
from moetrain.inference.mode import Mode
from moetrain.inference.protocol import Model
from moetrain.inference.protocol import Sequence as Generated
from moetrain.inference.rows import PAGE, Chunk, Rows
from moetrain.inference.sampling import Sampling
from moetrain.inference.speculation import Speculation
from moetrain.kernels.build import Library
from moetrain.kernels.choice import find_for_generation
from moetrain.kernels.config import Kernels
from moetrain.model.config import ModelConfig, ScoreFunction
from moetrain.model.transformer import Transformer, initialize
from moetrain.ops.logprobs import chunked_logprobs, read_natively
from moetrain.quant.apply import apply
from moetrain.quant.config import QuantConfig
from moetrain.runtime import seed_of, torch_stream
from moetrain.verify.table import Row

SHAPES: dict[str, dict[str, Any]] = {
    "int4": {},
    "int4, queries not compressed, softmax scores, groups, multi-token prediction": {
        **{"q_lora_rank": None, "score_function": ScoreFunction.softmax, "num_groups": 2, "num_mtp_layers": 1},
    },
    "bf16, odd widths": {
        **{"hidden_size": 80, "num_heads": 3, "kv_lora_rank": 48, "qk_rope_head_dim": 8, "qk_nope_head_dim": 24},
        **{"v_head_dim": 40, "moe_intermediate_size": 24, "intermediate_size": 72},
    },
}
"""Changes to the nano shape, by name."""
COMPANY = (7, 64)
"""Numbers of sequences that generate together."""
TEMPERATURE = 0.7
"""Temperature of all samples, other than 1 so that the logprobs depend on it."""
_PREFIX_SHARE = 0.6
_REPEATING = Sampling(temperature=0.5, logit_bias=((5, 40.0), (6, 40.0)))
"""Draws two tokens only, so that drafts are made, some of them right and some wrong."""


class Faulty:
    """A model that computes steps of several sequences wrongly, to show that the command notices."""

    FAULTS = ("stale_page", "wrong_position", "other_row")

    def __init__(self, model: Model, fault: str) -> None:
        self._model = model
        self._fault = fault
        self.config = model.config
        self.device = model.device
        self.logprob_library = model.logprob_library
        self.new_cache = model.new_cache
        self.logits = model.logits
        self.can_draft = model.can_draft
        self.draft = model.draft

    def forward(self, rows: Rows, cache_LPSC: torch.Tensor) -> torch.Tensor:
        """Return hidden states with the fault."""
        if len(rows.counts) == 1:
            return self._model.forward(rows, cache_LPSC)
        if self._fault == "stale_page":
            tables_SW = rows.tables_SW.clone()
            tables_SW[-1, 0] = tables_SW[0, 0]
            rows = replace(rows, tables_SW=tables_SW)
        if self._fault == "wrong_position":
            rows = replace(rows, positions_N=(rows.positions_N - 1).clamp(min=0))
        hidden_ND = self._model.forward(rows, cache_LPSC)
        return hidden_ND.flip(0) if self._fault == "other_row" else hidden_ND


def verify_rollout(run: VerifyRolloutRun) -> Iterator[Row]:
    """Yield the differences by model, mode and batch. Raises ConfigError without kernels."""
    library = find_for_generation(Kernels.auto)
    if library is None:
        raise ConfigError(
            "verify rollout checks the native kernels, which are unavailable here: install g++ or set CXX"
        )
    names = list(SHAPES) if run.fault == "none" else list(SHAPES)[:1]
    for name, fields in ((name, SHAPES[name]) for name in names):
        config, quant = ModelConfig(**fields), QuantConfig(enabled=name.startswith("int4"))
        native = _source(config, quant, seed=run.run.seed, library=library)
        state, device = native.state_dict(), torch.device("cpu")
        made = {
            mode: build_model(
                state,
                config=config,
                quant=quant,
                library=library,
                device=device,
                mode=mode,
                speculation=Speculation.auto,
            )
            for mode in Mode
        }
        prompts = _prompts(run, config.vocab_size)
        alone = {mode: _alone(run, model, prompts) for mode, model in made.items()}
        for mode, model in made.items():
            yield from _company_rows(run, f"{name}, {mode}", model=model, alone=alone[mode])
        if run.fault == "fast_attention":
            alone[Mode.deterministic] = alone[Mode.fast]
        yield _equality_row(name, native, alone[Mode.deterministic])
        plain = _source(config, quant, seed=run.run.seed)
        exact = _source(config, quant, seed=run.run.seed, dtype=torch.float32)
        chain = _Chain(fast=made[Mode.fast], native=native, plain=plain, exact=exact, library=library)
        yield from _gap_rows(name, chain, alone[Mode.fast])


def _source(
    config: ModelConfig,
    quant: QuantConfig,
    *,
    seed: int,
    library: Library | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Transformer:
    """Return the training model; `library` None computes by torch."""
    source = Transformer(config, compute_dtype=dtype, library=library)
    initialize(source, seed)
    for _, buffer in source.named_buffers():
        buffer.normal_(std=0.1, generator=torch_stream(seed, "verify/biases"))
    if quant.enabled:
        apply([layer.experts for _, layer in source.moe_layers()], quant)
    return source


def _alone(run: VerifyRolloutRun, model: Model, prompts: Sequence[Sequence[int]]) -> list[Generated]:
    return [_generate(run, model, [prompt], streams=[place])[0] for place, prompt in enumerate(prompts)]


def _company_rows(run: VerifyRolloutRun, name: str, *, model: Model, alone: Sequence[Generated]) -> Iterator[Row]:
    """Yield the number of sampled tokens that differ from those of the same sequences `alone`, by batch."""
    prompts = _prompts(run, model.config.vocab_size)
    crowd = Faulty(model, run.fault) if run.fault in Faulty.FAULTS else model
    count = f"of {sum(len(each.tokens) for each in alone) - sum(map(len, prompts))} tokens"
    for size in COMPANY:
        together: list[Generated] = []
        for start in range(0, len(prompts), size):
            part = range(start, min(start + size, len(prompts)))
            together += _generate(run, crowd, [prompts[place] for place in part], streams=list(part))
        shared = sum(each.num_cached for each in together)
        note = f"{count}; {shared} prompt tokens from shared pages"
        yield Row(
            name=f"{name}: alone and with {size - 1} others", value=_differing(alone, together), bound=0, note=note
        )
    tight = _generate(run, crowd, prompts, streams=range(len(prompts)), pages=3 * _pages(run))
    yield Row(name=f"{name}: with pages for 3 sequences", value=_differing(alone, tight), bound=0, note=count)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    other = _generate(run, crowd, prompts, streams=range(len(prompts)))
    torch.set_num_threads(threads)
    yield Row(name=f"{name}: 1 and 2 threads", value=_differing(alone, other), bound=0, note=count)
    yield _drafted_row(run, name, model=model, crowd=crowd, prompts=prompts[: min(COMPANY)])


def _equality_row(name: str, native: Transformer, sequences: Sequence[Generated]) -> Row:
    """Return the number of sampled logprobs that are not those of training with the native kernels, bit for bit."""
    found, trained = _sampled_logprobs(sequences), _trained_logprobs(native, sequences)
    note = f"of {len(found)} logprobs at temperature {TEMPERATURE}"
    differing = float((found != trained).sum())
    return Row(name=f"{name}, {Mode.deterministic}: sampled and trained logprobs", value=differing, bound=0, note=note)


@dataclass(frozen=True, kw_only=True)
class _Chain:
    """The same weights, computed in several ways; from one to the next one cause of the gap changes.

    fast: generation. native, plain, exact: training with native kernels, with torch's in bf16, and in float32.
    """

    fast: Model
    native: Transformer
    plain: Transformer
    exact: Transformer
    library: Library


def _gap_rows(name: str, chain: _Chain, sequences: Sequence[Generated]) -> Iterator[Row]:
    """Yield the differences of the mode `fast` to training, and their causes."""
    native, plain, exact = (_trained_logprobs(source, sequences) for source in (chain.native, chain.plain, chain.exact))
    sampled = _sampled_logprobs(sequences)
    read = _read_logprobs(chain.fast, sequences, library=chain.library)
    bound = 2 * float((plain - exact).abs().mean())  # both sides are in bf16: at most the sum of their errors
    note = "nats per token, mean; the bound is twice the error of training in bf16"
    for what, one, other in (
        ("to training with native kernels", sampled, native),
        ("by attention over latents", read, native),
        ("by the sampler's log-softmax", sampled, read),
        ("to training with torch's kernels", sampled, plain),
        ("by the order of sums in torch's kernels", native, plain),
    ):
        yield Row(name=f"{name}, fast: gap {what}", value=float((one - other).abs().mean()), bound=bound, note=note)


def _drafted_row(
    run: VerifyRolloutRun, name: str, *, model: Model, crowd: Model, prompts: Sequence[Sequence[int]]
) -> Row:
    """Return the row that compares generation with and without drafts."""
    streams = range(len(prompts))
    plain = [
        _generate(run, model, [prompt], streams=[place], sampling=_REPEATING)[0] for place, prompt in enumerate(prompts)
    ]
    drafted = _generate(run, crowd, prompts, streams=streams, sampling=_REPEATING, speculation=Speculation.auto)
    count = sum(sum(each.is_sampled) for each in plain)
    return Row(name=f"{name}: with drafts", value=_differing(plain, drafted), bound=0, note=f"of {count} tokens")


def _prompts(run: VerifyRolloutRun, vocab_size: int) -> list[list[int]]:
    """Return as many prompts as the largest batch; three in four share a beginning with others."""
    stream = torch_stream(run.run.seed, "verify/prompts")
    shared = [torch.randint(vocab_size, (run.prompt_tokens,), generator=stream).tolist() for _ in range(4)]
    prompts = []
    for place in range(max(COMPANY)):
        common = int(run.prompt_tokens * _PREFIX_SHARE) if place % 4 else 0
        own = torch.randint(vocab_size, (run.prompt_tokens - common,), generator=stream).tolist()
        prompts.append(shared[place % len(shared)][:common] + own)
    return prompts


def _pages(run: VerifyRolloutRun) -> int:
    return -(-(run.prompt_tokens + run.new_tokens) // PAGE)


def _generate(
    run: VerifyRolloutRun,
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    streams: Sequence[int],
    pages: int | None = None,
    sampling: Sampling | None = None,
    speculation: Speculation = Speculation.off,
) -> list[Generated]:
    """Return the finished sequences. pages: size of the cache; None has room for all."""
    limit = run.prompt_tokens + run.new_tokens
    megabytes = None if pages is None else (pages + 0.5) * model.new_cache(1).nbytes / (1 << 20)
    engine = GenerationEngine(
        model, num_slots=len(prompts), max_tokens=limit, cache_megabytes=megabytes, speculation=speculation
    )
    sequences = [
        Generated(
            tokens=list(prompt),
            stream=seed_of(run.run.seed, "verify/sampling", stream),
            limit=limit,
            sampling=sampling or Sampling(temperature=TEMPERATURE),
        )
        for prompt, stream in zip(prompts, streams, strict=True)
    ]
    for sequence in sequences:
        engine.add(sequence)
    while engine.is_busy:
        engine.step()
    return sequences


def _differing(first: Sequence[Generated], second: Sequence[Generated]) -> float:
    """Return the number of sampled tokens that differ, or whose logprobs differ in any bit."""
    different = 0
    for one, other in zip(first, second, strict=True):
        for place, is_sampled in enumerate(one.is_sampled):
            same = one.tokens[place] == other.tokens[place] and one.logprobs[place] == other.logprobs[place]
            different += is_sampled and not same
    return float(different)


def _sampled_logprobs(sequences: Sequence[Generated]) -> torch.Tensor:
    """Return the logprobs with which all tokens were sampled."""
    pairs = [zip(each.logprobs, each.is_sampled, strict=True) for each in sequences]
    return torch.tensor([logprob for pair in pairs for logprob, is_sampled in pair if is_sampled])


@torch.no_grad()
def _trained_logprobs(source: Transformer, sequences: Sequence[Generated]) -> torch.Tensor:
    """Return the logprobs of all sampled tokens by the training forward pass."""
    tokens_BT = torch.tensor([sequence.tokens for sequence in sequences])
    positions_BT = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
    hidden_BTD = source(tokens_BT, segments_BT=torch.ones_like(tokens_BT), positions_BT=positions_BT).hidden_BTD
    row_N, place_N = torch.tensor([sequence.is_sampled for sequence in sequences]).nonzero(as_tuple=True)
    logprobs_N, _ = chunked_logprobs(
        hidden_BTD[row_N, place_N - 1],
        source.lm_head.weight,
        targets_N=tokens_BT[row_N, place_N],
        temperatures_N=torch.full((len(row_N),), TEMPERATURE),
        library=source.library,
    )
    return logprobs_N


@torch.no_grad()
def _read_logprobs(model: Model, sequences: Sequence[Generated], *, library: Library) -> torch.Tensor:
    """Return the logprobs of all sampled tokens by generation's forward pass and the log-softmax of training."""
    found = []
    for sequence in sequences:
        pages = range(-(-len(sequence.tokens) // PAGE))
        chunk = Chunk(tokens=sequence.tokens, start=0, pages=pages)
        hidden_ND = model.forward(Rows.of([chunk], device=model.device), model.new_cache(len(pages)))
        place_N = torch.tensor(sequence.is_sampled).nonzero()[:, 0]
        logits_NV = model.logits(hidden_ND[place_N - 1]).bfloat16()
        temperatures_N = torch.full((len(place_N),), TEMPERATURE)
        targets_N = torch.tensor(sequence.tokens)[place_N]
        found.append(read_natively(logits_NV, targets_N, temperatures_C=temperatures_N, library=library).logprobs_C)
    return torch.cat(found)
