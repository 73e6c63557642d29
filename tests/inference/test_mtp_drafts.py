"""Drafts by a module of multi-token prediction: they are what the module predicts, and change no token."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from moetrain.inference.build import build_model
from moetrain.inference.engine import GenerationEngine
from moetrain.inference.mode import Mode
from moetrain.inference.protocol import Counts, Model, Sequence
from moetrain.inference.rows import Chunk, Rows
from moetrain.inference.sampling import Sampling
from moetrain.inference.speculation import ModulePayoff, Speculation
from moetrain.kernels.build import load
from moetrain.model.config import ModelConfig
from moetrain.model.mtp import Mtp
from moetrain.model.transformer import MtpBlock, Transformer, initialize
from moetrain.quant.apply import apply
from moetrain.quant.config import QuantConfig

VOCAB = 40
CONFIG = ModelConfig(
    vocab_size=VOCAB, hidden_size=64, num_layers=2, num_mtp_layers=1, moe_intermediate_size=32, initializer_range=0.2
)
QUANT = QuantConfig(enabled=True)


def _source(*, dtype: torch.dtype, config: ModelConfig = CONFIG) -> Transformer:
    model = Transformer(config, compute_dtype=dtype)
    initialize(model, 1)
    apply([layer.experts for _, layer in model.moe_layers()], QUANT)
    return model


def _built(source: Transformer, *, speculation: Speculation = Speculation.auto, **kind: Any) -> Model:
    return build_model(source.state_dict(), config=source.config, quant=QUANT, speculation=speculation, **kind)


@pytest.mark.parametrize("kind", ["plain", "native", "deterministic"])
def test_the_draft_is_what_the_module_predicts_in_training(kind: str) -> None:
    is_plain = kind == "plain"
    # In bfloat16 every expert is chosen: rounding would send some tokens to others than in training.
    config = CONFIG if is_plain else replace(CONFIG, num_experts_per_token=CONFIG.num_experts)
    source = _source(dtype=torch.float32 if is_plain else torch.bfloat16, config=config)
    if is_plain:
        model = _built(source, library=None, dtype=torch.float32)
    else:
        model = _built(source, library=load(), mode=Mode(kind) if kind == "deterministic" else Mode.fast)
    tokens = torch.randint(0, VOCAB, (2, 90), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        positions = torch.arange(90).expand(2, 90)
        output = source(tokens, segments_BT=torch.ones_like(tokens), positions_BT=positions, mtp=Mtp.joint)
        expected = source.logits(output.mtp.hidden_BTD[0][:, :-1].flatten(0, 1)).view(2, 89, -1)
    cache = model.new_cache(4)
    found: list[torch.Tensor] = []
    for first, last in ((0, 70), (70, 71), (71, 73), (73, 89)):
        rows, following = (
            Rows.of(
                [
                    Chunk(tokens=tokens[row, first + shift : last + shift].tolist(), start=first, pages=[row, row + 2])
                    for row in range(2)
                ],
                device=model.device,
            )
            for shift in (0, 1)
        )
        hidden = model.forward(rows, cache)
        found.append(model.logits(model.draft(hidden, following, cache_LPSC=cache)).view(2, last - first, -1))
    gaps_BT = (torch.cat(found, 1) - expected).abs().amax(-1)
    assert gaps_BT.max() < (2e-5 if is_plain else 0.05 * expected.abs().max())


def _run(model: Model, prompts: list[list[int]], speculation: Speculation) -> tuple[list[Sequence], Counts]:
    """Return sequences of two turns with [3, 4] given between them."""
    engine = GenerationEngine(model, num_slots=len(prompts), max_tokens=200, speculation=speculation)
    samplings = [Sampling(temperature=temperature) for temperature in (0.0, 0.3, 1.0)]
    sequences = [
        Sequence(tokens=list(prompt), stream=place, limit=len(prompt) + 40, sampling=samplings[place % 3])
        for place, prompt in enumerate(prompts)
    ]
    for sequence in sequences:
        engine.add(sequence)
    while engine.is_busy:
        for ended in engine.step():
            if len(ended.tokens) < 130:
                engine.extend(ended, [3, 4], limit=len(ended.tokens) + 42)
            else:
                engine.cancel(ended)
    return sequences, engine.counts


@pytest.mark.parametrize("number", [1, 3, 12])
def test_drafts_change_no_token_and_no_logprob(number: int) -> None:
    stream = random.Random(number)
    shared = [stream.randrange(VOCAB) for _ in range(66)]
    prompts = [shared + [stream.randrange(VOCAB) for _ in range(place)] for place in range(number)]
    model = _built(_source(dtype=torch.bfloat16), library=load())
    plain, _ = _run(model, prompts, Speculation.off)
    drafted, counts = _run(model, prompts, Speculation.auto)
    for one, other in zip(plain, drafted, strict=True):
        assert one.tokens == other.tokens
        assert one.logprobs == other.logprobs
    assert counts.num_drafted > counts.num_right >= 0


def test_right_drafts_save_steps() -> None:
    """Let the module compute what the model does, so that it predicts the next token but one as the model will."""
    source = _source(dtype=torch.bfloat16)
    module = source.model.layers[CONFIG.num_layers]
    assert isinstance(module, MtpBlock)
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                parameter.zero_()  # every block passes its input on: the next token follows from the last one alone
        module.eh_proj.weight.zero_()
        module.eh_proj.weight[:, : CONFIG.hidden_size].copy_(torch.eye(CONFIG.hidden_size))
    model = _built(source, library=load())
    prompt = [[1, 2, 3]]
    engine = GenerationEngine(model, num_slots=1, max_tokens=60, speculation=Speculation.auto)
    sequence = Sequence(tokens=prompt[0], stream=1, limit=14, sampling=Sampling(temperature=0.0))
    engine.add(sequence)
    steps = 0
    while engine.is_busy:
        engine.step()
        steps += 1
    assert engine.counts.num_right == engine.counts.num_drafted > 0
    assert steps <= 7, "each step draws two tokens"


def test_without_speculation_the_module_is_not_built() -> None:
    source = _source(dtype=torch.bfloat16)
    model = _built(source, library=load(), speculation=Speculation.off)
    assert not model.can_draft
    assert len(model.new_cache(1)) == CONFIG.num_layers
    assert len(_built(source, library=load()).new_cache(1)) == CONFIG.num_layers + 1


@pytest.mark.parametrize(("right_of_two", "pays"), [(2, True), (1, False), (0, False)])
def test_a_module_that_costs_more_than_it_saves_pauses(right_of_two: int, pays: bool) -> None:
    payoff, predicted = ModulePayoff(), []
    for step in range(5000):
        payoff.note_step(0.010)
        if payoff.is_due():
            predicted.append(step)
            payoff.note_draft(is_right=step % 2 < right_of_two)
            payoff.note_prediction(0.003, num_sequences=1)
    if pays:
        assert predicted == list(range(5000))
    else:
        assert predicted[:64] == list(range(64)) and predicted[64] > 4000


@pytest.mark.parametrize(("num_right", "pays"), [(4, True), (3, False)])
def test_what_a_right_draft_saves_is_a_step_of_its_sequence(num_right: int, pays: bool) -> None:
    """Four sequences are predicted together: right drafts save steps of each, not of one."""
    payoff = ModulePayoff()
    for _ in range(64):
        payoff.note_step(0.010)
        assert payoff.is_due()
        for place in range(4):
            payoff.note_draft(is_right=place < num_right)
        payoff.note_prediction(0.004, num_sequences=4)
    assert payoff.is_due() == pays, "0.6 and 0.35 of a step of 10 ms, less what the drafts cost, against 4 ms"
