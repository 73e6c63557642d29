"""Training steps and generation on a GPU, compared with the CPU on the same small random models.

Bounds are multiples of errors of the CPU that are measured in the same call, relative to float32 on the CPU: that of
bfloat16, and that of training in float32 from weights which differ in their last digits. Sums in another order do as
much, because a rounding can change an expert, a code, or the sign of AdamW's first update.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch

from moetrain.data.batch import TokenBatch
from moetrain.inference.build import build_model
from moetrain.inference.engine import GenerationEngine
from moetrain.inference.protocol import Model
from moetrain.inference.protocol import Sequence as Generated
from moetrain.inference.rows import PAGE, Chunk, Rows
from moetrain.model.config import ModelConfig
from moetrain.model.transformer import Transformer, allocate, initialize
from moetrain.optim.config import OptimConfig
from moetrain.parallel.topology import Topology
from moetrain.parallel.torch_engine import TorchEngine
from moetrain.quant.apply import apply
from moetrain.quant.config import QuantConfig
from moetrain.runtime import torch_stream
from moetrain.train.loss import language_model_objective
from moetrain.train.step import train_step
from moetrain.verify.table import Row

_STEPS, _ROWS, _TOKENS = 4, 4, 96
_RATE = 1e-2
_NOISE, _NOISES = 2.0**-20, 3
"""Relative changes of the weights that stand for the rounding of a step in float32, and how many are tried."""
_TF32 = 1e-3
"""Bound of a relative difference in float32 where a GPU may multiply numbers of 11 bits (TF32)."""
_FACTOR = 4.0
"""Bound of an error in units of the CPU's: both are random, and of few numbers."""
_LENGTHS = (1, 5, 70, 130)
_CPU = torch.device("cpu")


def training_rows(device: torch.device) -> Iterator[Row]:
    """Yield the differences of losses and gradient norms from those of the CPU."""
    exact = _trained(_CPU, torch.float32)
    noisy = [_trained(_CPU, torch.float32, noise=stream) for stream in range(_NOISES)]
    rounded = [_trained(_CPU, torch.bfloat16)]
    for dtype, on_cpu in ((torch.float32, noisy), (torch.bfloat16, rounded)):
        found = _trained(device, dtype)
        for name in ("loss", "grad_norm"):
            error = max(_worst(run, exact, name=name) for run in on_cpu)
            note = f"relative, the worst of {_STEPS} steps; the CPU's: {error:.2g}"
            value = _worst(found, exact, name=name)
            yield Row(name=f"{name} in {str(dtype)[6:]}", value=value, bound=_FACTOR * error, note=note)


def _worst(found: Sequence[Mapping[str, float]], exact: Sequence[Mapping[str, float]], *, name: str) -> float:
    return max(abs(one[name] / other[name] - 1) for one, other in zip(found, exact, strict=True))


def _trained(device: torch.device, dtype: torch.dtype, *, noise: int | None = None) -> list[dict[str, float]]:
    """Return the metrics of each training step. noise: stream of small changes of the first weights; None for none."""
    config = ModelConfig()
    with torch.device("meta"):
        model = Transformer(config, compute_dtype=dtype)
    apply([layer.experts for _, layer in model.moe_layers()], QuantConfig(enabled=True))
    allocate(model, device)
    initialize(model, 0)
    if noise is not None:
        for name, weight in model.named_parameters():
            changes = torch.randn(weight.shape, generator=torch_stream(0, f"verify/gpu/noise/{name}", noise))
            weight.data *= 1 + _NOISE * changes.to(device)
    engine = TorchEngine(model, Topology(device=device), optim_config=OptimConfig(lr=_RATE), compute_dtype=dtype)
    return [
        train_step(
            engine,
            lambda counts: language_model_objective(counts, balance=config.balance),
            micro_batches=[_batch(step, config)],
            learning_rate=_RATE,
            balance=config.balance,
            step=step,
        )
        for step in range(_STEPS)
    ]


def _batch(step: int, config: ModelConfig) -> TokenBatch:
    """Return random rows of two documents each."""
    tokens_BT = torch.randint(config.vocab_size, (_ROWS, _TOKENS), generator=torch_stream(0, "verify/gpu/batch", step))
    positions_BT = torch.arange(_TOKENS).repeat(_ROWS, 1)
    first = _TOKENS // 3
    positions_BT[:, first:] -= first
    return TokenBatch(
        tokens_BT=tokens_BT,
        segments_BT=1 + (torch.arange(_TOKENS) >= first).long().repeat(_ROWS, 1),
        positions_BT=positions_BT,
        loss_mask_BT=positions_BT > 0,
    )


def decode_rows(device: torch.device) -> Iterator[Row]:
    """Yield the errors of logits and of the logprobs of sampled tokens, with INT4 and with bfloat16 experts."""
    for is_quantised in (True, False):
        yield from _decode_rows("int4" if is_quantised else "bf16", device, quant=QuantConfig(enabled=is_quantised))


def _decode_rows(name: str, device: torch.device, *, quant: QuantConfig) -> Iterator[Row]:
    config = ModelConfig()
    state = _state(config)

    def model(place: torch.device, dtype: torch.dtype) -> Model:
        return build_model(state, config=config, quant=quant, library=None, dtype=dtype, device=place)

    stream = torch_stream(0, "verify/gpu/prompts")
    prompts = [torch.randint(config.vocab_size, (length,), generator=stream).tolist() for length in _LENGTHS]
    exact, on_cpu, found = model(_CPU, torch.float32), model(_CPU, torch.bfloat16), model(device, torch.bfloat16)
    expected = _logits(exact, prompts)
    note = "relative, the median of all rows"
    value = _error(_logits(model(device, torch.float32), prompts), expected)
    yield Row(name=f"{name} experts: logits in float32", value=value, bound=_TF32, note=note)
    rounding = _error(_logits(on_cpu, prompts), expected)
    note += f"; the CPU in bfloat16: {rounding:.2g}"
    value = _error(_logits(found, prompts), expected)
    yield Row(name=f"{name} experts: logits in bfloat16", value=value, bound=_FACTOR * rounding, note=note)
    sequences = _generated(found, prompts)
    sampled = torch.tensor([value for each in sequences for value in _of_sampled(each, each.logprobs)])
    expected = _forced(exact, sequences)
    rounding = float((_forced(on_cpu, sequences) - expected).abs().mean())
    note = f"nats, the mean of {len(sampled)} tokens; the CPU in bfloat16: {rounding:.2g}"
    value = float((sampled - expected).abs().mean())
    yield Row(name=f"{name} experts: logprobs of sampled tokens", value=value, bound=_FACTOR * rounding, note=note)


def _state(config: ModelConfig) -> dict[str, torch.Tensor]:
    source = Transformer(config)
    initialize(source, 0)
    for _, buffer in source.named_buffers():
        buffer.normal_(std=0.1, generator=torch_stream(0, "verify/gpu/biases"))
    return source.state_dict()


def _logits(model: Model, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the logits after all tokens of all sequences: a chunk of each together, and then token by token."""
    pages = max(map(len, sequences)) // PAGE + 1
    cache = model.new_cache(pages * len(sequences))
    found: list[list[torch.Tensor]] = [[] for _ in sequences]
    ends = [max(len(tokens) - 4, 0) for tokens in sequences]
    steps = [[(0, end) for end in ends]]
    for ahead in range(4):
        steps.append([(end + ahead, min(end + ahead + 1, len(t))) for end, t in zip(ends, sequences, strict=True)])
    for step in steps:
        fed = [place for place, (start, end) in enumerate(step) if start < end]
        if not fed:
            continue
        chunks = [
            Chunk(
                tokens=sequences[place][slice(*step[place])],
                start=step[place][0],
                pages=range(place * pages, (place + 1) * pages),
            )
            for place in fed
        ]
        with torch.no_grad():
            states = model.forward(Rows.of(chunks, device=model.device), cache)
            parts = torch.split(model.logits(states).cpu(), [len(chunk.tokens) for chunk in chunks])
        for place, part in zip(fed, parts, strict=True):
            found[place].append(part)
    return torch.cat([part for parts in found for part in parts])


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the median over rows; in a few rows rounding chooses another expert."""
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


def _generated(model: Model, prompts: Sequence[Sequence[int]]) -> list[Generated]:
    """Return the prompts, continued by sampling."""
    engine = GenerationEngine(model, num_slots=len(prompts), max_tokens=256, cache_megabytes=64)
    sequences = [
        Generated(tokens=list(prompt), stream=place, limit=len(prompt) + 24) for place, prompt in enumerate(prompts)
    ]
    for sequence in sequences:
        engine.add(sequence)
    while engine.is_busy:
        engine.step()
    return sequences


def _of_sampled(sequence: Generated, values: Sequence[float]) -> list[float]:
    return [value for value, is_sampled in zip(values, sequence.is_sampled, strict=True) if is_sampled]


def _forced(model: Model, sequences: Sequence[Generated]) -> torch.Tensor:
    """Return the logprobs that a model gives to the sampled tokens."""
    logits = _logits(model, [sequence.tokens for sequence in sequences])
    values, end = [], 0
    for sequence in sequences:
        size = len(sequence.tokens)
        logprobs = torch.log_softmax(logits[end : end + size - 1], -1)
        of_tokens = logprobs.gather(1, torch.tensor(sequence.tokens[1:])[:, None])[:, 0].tolist()
        values += _of_sampled(sequence, [0.0, *of_tokens])
        end += size
    return torch.tensor(values)
