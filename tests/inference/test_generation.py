import numpy as np
import pytest
import torch

from moetrain.errors import RolloutError
from moetrain.inference.build import build_model
from moetrain.inference.engine import GenerationEngine
from moetrain.inference.protocol import Model, Sequence
from moetrain.inference.rows import Chunk, Rows
from moetrain.inference.sampling import sample, uniforms
from moetrain.model.config import ModelConfig, YarnConfig
from moetrain.model.transformer import Transformer, initialize
from moetrain.quant.apply import apply
from moetrain.quant.config import QuantConfig

_SHAPE = {"vocab_size": 40, "hidden_size": 64, "num_layers": 3, "moe_intermediate_size": 32, "initializer_range": 0.2}


def _model(*, quantised: bool = False, **fields: object) -> tuple[Transformer, Model]:
    config = ModelConfig(**{**_SHAPE, **fields})  # type: ignore[arg-type]
    quant = QuantConfig(enabled=quantised)
    model = Transformer(config, compute_dtype=torch.float32)
    initialize(model, 1)
    if quantised:
        apply([layer.experts for _, layer in model.moe_layers()], quant)
    return model, build_model(model.state_dict(), config=config, quant=quant, library=None, dtype=torch.float32)


def _full_logits(model: Transformer, tokens: list[int]) -> torch.Tensor:
    tokens_1T = torch.tensor([tokens])
    positions_1T = torch.arange(len(tokens))[None]
    with torch.no_grad():
        hidden = model(tokens_1T, segments_BT=torch.ones_like(tokens_1T), positions_BT=positions_1T).hidden_BTD
        return model.logits(hidden[0])


@pytest.mark.parametrize(
    "fields", [{}, {"q_lora_rank": None}, {"yarn": YarnConfig(factor=4.0)}, {"num_experts": 4, "num_groups": 2}]
)
@pytest.mark.parametrize("quantised", [False, True])
def test_the_cached_forward_equals_the_training_forward(fields: dict[str, object], quantised: bool) -> None:
    model, weights = _model(quantised=quantised, **fields)
    tokens = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    cache = weights.new_cache(2)
    parts: list[torch.Tensor] = []
    for first, last in ((0, 6), (6, 7), (7, 8), (8, 9)):
        chunks = [Chunk(tokens=tokens[row, first:last].tolist(), start=first, pages=[row]) for row in range(2)]
        hidden = weights.forward(Rows.of(chunks, device=weights.device), cache)
        parts.append(weights.logits(hidden).view(2, last - first, -1))
    logits = torch.cat(parts, 1)
    for row in range(2):
        torch.testing.assert_close(logits[row], _full_logits(model, tokens[row].tolist()), rtol=0, atol=2e-5)


def _generate(
    weights: Model, prompts: list[list[int]], *, slots: int, length: int, idle_steps: int = 0
) -> list[Sequence]:
    """Return sequences of two turns; [3, 4, 5] is given between them, `idle_steps` times the number of it later."""
    engine = GenerationEngine(weights, num_slots=slots, max_tokens=32, version=7)
    sequences = [Sequence(tokens=list(prompt), stream=index + 5, limit=6) for index, prompt in enumerate(prompts)]
    for sequence in sequences:
        engine.add(sequence)
    idle: list[tuple[int, Sequence]] = []
    step = 0
    while engine.is_busy or idle:
        for sequence in engine.step():
            if len(sequence.tokens) == 6:
                idle.append((step + idle_steps * (sequence.stream - 4), sequence))
            else:
                engine.cancel(sequence)
        for due, sequence in list(idle):
            if due <= step:
                idle.remove((due, sequence))
                engine.extend(sequence, [3, 4, 5], limit=length)
        step += 1
    return sequences


def test_a_sequence_does_not_depend_on_its_neighbours_slots_or_arrival() -> None:
    _, weights = _model()
    prompts = [[1, 2, 3], [7], [9, 8, 7, 6], [2, 2], [5, 6, 7]]
    together = _generate(weights, prompts, slots=5, length=14)
    two_by_two = _generate(weights, prompts, slots=2, length=14)
    waited = _generate(weights, prompts, slots=5, length=14, idle_steps=3)
    few_waited = _generate(weights, prompts, slots=2, length=14, idle_steps=2)
    for others in (two_by_two, waited, few_waited):
        assert [s.tokens for s in together] == [s.tokens for s in others]
    assert all(len(s.tokens) == 14 for s in together)


def test_a_turn_ends_with_its_last_token_and_is_not_continued_before_it_is_extended() -> None:
    _, weights = _model()
    (plain,) = _generate(weights, [[1, 2, 3]], slots=1, length=14)
    stop = plain.tokens[4]
    engine = GenerationEngine(weights, num_slots=1, max_tokens=32)
    sequence = Sequence(tokens=[1, 2, 3], stream=5, limit=20, stop_ids=frozenset({stop}))
    engine.add(sequence)
    ended = [sequence for _ in range(9) for sequence in engine.step()]
    assert ended == [sequence] and sequence.is_idle and not engine.is_busy
    assert sequence.tokens == plain.tokens[: 1 + plain.tokens.index(stop, 3)]
    engine.cancel(sequence)
    waiting = Sequence(tokens=[1, 2], stream=6, limit=20)
    engine.add(waiting)
    engine.cancel(waiting)
    assert not engine.is_busy
    with pytest.raises(RolloutError, match="of 2 tokens is to be continued to 40: the cache holds 32"):
        engine.add(Sequence(tokens=[1, 2], stream=6, limit=40))


def test_new_weights_continue_sequences_as_if_they_had_read_them_from_the_start() -> None:
    model, old = _model()
    initialize(model, 2)
    new = build_model(model.state_dict(), config=model.config, quant=QuantConfig(), library=None, dtype=torch.float32)
    engine = GenerationEngine(old, num_slots=2, max_tokens=32, version=3)
    running, idle = (
        Sequence(tokens=[1, 2, 3], stream=5, limit=16),
        Sequence(tokens=[4, 5], stream=6, limit=5),
    )
    engine.add(running)
    engine.add(idle)
    for _ in range(4):
        engine.step()
    engine.load(new, version=4)
    assert engine.step() == [] and idle.is_idle
    engine.extend(idle, [6, 7], limit=12)
    while engine.is_busy:
        engine.step()
    assert running.versions == [3] * 7 + [4] * 9 and idle.versions == [3] * 5 + [4] * 7
    for sequence in (running, idle):
        logprobs = torch.log_softmax(_full_logits(model, sequence.tokens), -1)
        for position, version in enumerate(sequence.versions):
            if sequence.is_sampled[position] and version == 4:
                expected = float(logprobs[position - 1, sequence.tokens[position]])
                assert abs(sequence.logprobs[position] - expected) < 1e-4


def test_recorded_logprobs_are_those_of_the_training_forward() -> None:
    model, weights = _model()
    for sequence in _generate(weights, [[1, 2, 3], [4, 4]], slots=2, length=14):
        logprobs = torch.log_softmax(_full_logits(model, sequence.tokens), -1)
        for position in range(1, len(sequence.tokens)):
            if sequence.is_sampled[position]:
                expected = float(logprobs[position - 1, sequence.tokens[position]])
                assert abs(sequence.logprobs[position] - expected) < 1e-4
            else:
                assert sequence.logprobs[position] == 0.0


def test_sampling_follows_the_distribution_and_greedy_takes_its_mode() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]])).expand(20_000, 3)
    draws = uniforms(np.full(20_000, 7, dtype=np.uint64), np.arange(20_000, dtype=np.uint64))
    tokens, logprobs = sample(logits, temperatures_B=torch.ones(20_000), uniforms_B=torch.from_numpy(draws))
    shares = torch.bincount(tokens, minlength=3) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2]), rtol=0, atol=0.02)
    torch.testing.assert_close(logprobs, logits[0][tokens], rtol=0, atol=1e-6)
    greedy, _ = sample(logits, temperatures_B=torch.zeros(20_000), uniforms_B=torch.from_numpy(draws))
    assert (greedy == 0).all()


def test_a_prompt_longer_than_the_cache_is_refused() -> None:
    _, weights = _model()
    with pytest.raises(RolloutError, match="the cache holds 32"):
        GenerationEngine(weights, num_slots=1, max_tokens=32).add(Sequence(tokens=[1] * 40, stream=0, limit=41))


def test_every_tensor_of_generation_names_its_device() -> None:
    """With another default device, whatever is made without naming one cannot meet the weights."""
    _, weights = _model()
    plain = _generate(weights, [[1, 2, 3], [4, 5]], slots=2, length=12)
    with torch.device("meta"):
        elsewhere = _generate(weights, [[1, 2, 3], [4, 5]], slots=2, length=12)
    assert [sequence.tokens for sequence in elsewhere] == [sequence.tokens for sequence in plain]
    assert weights.device == torch.device("cpu")
