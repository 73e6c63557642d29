"""The native forward pass: close to the plain one, and the same bits for a sequence in any company."""

from typing import Any

import pytest
import torch

from moetrain.errors import ConfigError
from moetrain.inference.build import build_model
from moetrain.inference.engine import GenerationEngine
from moetrain.inference.native import NativeModel
from moetrain.inference.protocol import Model, Sequence
from moetrain.inference.rows import PAGE, Chunk, Rows
from moetrain.kernels.build import Library, Units, load
from moetrain.model.config import ModelConfig, ScoreFunction
from moetrain.model.transformer import Transformer, initialize
from moetrain.quant.config import QuantConfig
from tests.ops.test_native import LIBRARIES, library_for
from tests.threads import num_threads

ODD: dict[str, Any] = {
    **{"hidden_size": 80, "num_heads": 3, "kv_lora_rank": 48, "qk_rope_head_dim": 8, "qk_nope_head_dim": 24},
    **{"v_head_dim": 40, "moe_intermediate_size": 24, "intermediate_size": 72},
}
SHAPES: list[tuple[dict[str, Any], bool]] = [
    ({}, True),
    ({"q_lora_rank": None, "score_function": ScoreFunction.softmax, "num_groups": 2}, True),
    ({"num_shared_experts": 0, "num_layers": 2}, True),
    ({"num_heads": 40, "num_layers": 2, "score_function": ScoreFunction.sqrt_softplus}, False),
    (ODD, False),
]


def models(library: Library | None, fields: dict[str, Any], *, is_quantised: bool) -> tuple[Model, Model]:
    """Return the same model in float32 by torch, and in bfloat16 by the kernels of `library`."""
    config = ModelConfig(**{"vocab_size": 50, "num_layers": 3, **fields})
    source = Transformer(config)
    initialize(source, 1)
    for _, buffer in source.named_buffers():
        buffer.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    quant, state = QuantConfig(enabled=is_quantised), source.state_dict()
    plain = build_model(state, config=config, quant=quant, library=None, dtype=torch.float32)
    return plain, build_model(state, config=config, quant=quant, library=library)


def hidden(model: Model, sequences: list[list[int]], *, chunk: int) -> list[torch.Tensor]:
    """Return the hidden states of all tokens, fed `chunk` tokens of every sequence at a time."""
    pages = max(map(len, sequences)) // PAGE + 1
    cache = model.new_cache(pages * len(sequences))
    found: list[list[torch.Tensor]] = [[] for _ in sequences]
    for start in range(0, max(map(len, sequences)), chunk):
        fed = [place for place, tokens in enumerate(sequences) if start < len(tokens)]
        chunks = [
            Chunk(
                tokens=sequences[place][start : start + chunk],
                start=start,
                pages=range(place * pages, (place + 1) * pages),
            )
            for place in fed
        ]
        states = model.forward(Rows.of(chunks, device=model.device), cache)
        for place, part in zip(fed, states.split([len(each.tokens) for each in chunks]), strict=True):  # type: ignore[no-untyped-call]
            found[place].append(part)
    return [torch.cat(parts) for parts in found]


@pytest.fixture(params=LIBRARIES, ids=lambda param: f"{param[0]} {Units(param[1]).name}")
def library(request: pytest.FixtureRequest) -> Library:
    return library_for(*request.param)


def _sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(50, (length,), generator=generator).tolist() for length in (1, 5, 70, 130)]


@pytest.mark.parametrize(("fields", "is_quantised"), SHAPES)
def test_hidden_states_are_those_of_the_plain_model_within_bfloat16(
    fields: dict[str, Any], is_quantised: bool, library: Library
) -> None:
    plain, native = models(library, fields, is_quantised=is_quantised)
    assert isinstance(native, NativeModel)
    for found, expected in zip(
        hidden(native, _sequences(), chunk=200), hidden(plain, _sequences(), chunk=200), strict=True
    ):
        # Nine bits of the largest number, of three layers; another expert where two scores are nearly equal.
        errors = (found.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert float(errors.median()) < 0.02
        logits, others = native.logits(found), plain.logits(expected)
        assert float((logits - others).norm() / others.norm()) < 0.1


@pytest.mark.parametrize(("fields", "is_quantised"), SHAPES)
def test_a_sequence_has_the_same_bits_in_any_company_chunks_and_threads(
    fields: dict[str, Any], is_quantised: bool, library: Library
) -> None:
    _, model = models(library, fields, is_quantised=is_quantised)
    sequences = _sequences()
    together = hidden(model, sequences, chunk=200)
    for chunk in (1, 17, 64):
        assert all(map(torch.equal, hidden(model, sequences, chunk=chunk), together))
    assert all(
        torch.equal(hidden(model, [one], chunk=33)[0], own) for one, own in zip(sequences, together, strict=True)
    )
    with num_threads(1):
        assert all(map(torch.equal, hidden(model, sequences, chunk=50), together))
    logits = model.logits(together[3])
    assert torch.equal(logits[7:8], model.logits(together[3][7:8]))


@pytest.mark.parametrize("fields", [{}, ODD])
def test_long_sequences_have_the_same_bits_in_any_company_chunks_and_threads(
    fields: dict[str, Any], library: Library
) -> None:
    """Attention by tiles adds spans of 512 positions, which the threads share where few rows are new."""
    plain, model = models(library, {"num_layers": 1, "num_dense_layers": 1, **fields}, is_quantised=False)
    generator = torch.Generator().manual_seed(5)
    sequences = [torch.randint(50, (length,), generator=generator).tolist() for length in (1100, 520)]
    together = hidden(model, sequences, chunk=1100)
    assert all(map(torch.equal, hidden(model, sequences, chunk=300), together))
    assert torch.equal(hidden(model, sequences[:1], chunk=10)[0], together[0])
    with num_threads(1):
        assert torch.equal(hidden(model, sequences[1:], chunk=64)[0], together[1])
    for found, expected in zip(together, hidden(plain, sequences, chunk=1100), strict=True):
        assert float((found.float() - expected).norm() / expected.norm()) < 0.02


def _generated(model: Model, prompts: list[list[int]], **engine: float) -> tuple[list[Sequence], GenerationEngine]:
    made = GenerationEngine(model, **{"num_slots": 8, "max_tokens": 256, **engine})  # type: ignore[arg-type]
    sequences = [Sequence(tokens=list(p), stream=i, limit=len(p) + 20) for i, p in enumerate(prompts)]
    for sequence in sequences:
        made.add(sequence)
    while made.is_busy:
        made.step()
    return sequences, made


def test_a_group_shares_its_prompt_and_nothing_depends_on_it() -> None:
    _, model = models(load(), {}, is_quantised=True)
    prompt = torch.randint(50, (150,), generator=torch.Generator().manual_seed(3)).tolist()
    together, engine = _generated(model, [prompt] * 4 + [[*prompt[:70], 1, 2, 3]])
    assert [sequence.num_cached for sequence in together] == [0, 149, 149, 149, 70]
    for place, sequence in enumerate(together):
        other = Sequence(tokens=sequence.tokens[:-20], stream=place, limit=len(sequence.tokens))
        own = GenerationEngine(model, num_slots=1, max_tokens=256)
        own.add(other)
        while own.is_busy:
            own.step()
        assert other.tokens == sequence.tokens and other.logprobs == sequence.logprobs
    for sequence in together:
        engine.cancel(sequence)
    assert engine.counts.num_pages_used == 0


def test_sequences_without_room_are_read_again_with_the_same_result() -> None:
    _, model = models(load(), {}, is_quantised=True)
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(50, (100,), generator=generator).tolist() for _ in range(5)]
    plenty, _ = _generated(model, prompts)
    megabytes = 5 * model.new_cache(1).nbytes / (1 << 20)
    scarce, engine = _generated(model, prompts, cache_megabytes=megabytes)
    assert [s.logprobs for s in scarce] == [s.logprobs for s in plenty]
    for sequence in scarce:
        engine.cancel(sequence)
    assert engine.counts.num_pages_used == 0


def test_a_cache_without_room_for_one_sequence_is_refused() -> None:
    _, model = models(load(), {}, is_quantised=True)
    with pytest.raises(ConfigError, match="has no room for a sequence of 256 tokens"):
        GenerationEngine(model, num_slots=1, max_tokens=256, cache_megabytes=0.01)
