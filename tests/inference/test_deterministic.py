"""In the mode `deterministic` generation has the bits of training: hidden states and logprobs, in any chunks."""

from typing import Any

import pytest
import torch

from moetrain.errors import ConfigError
from moetrain.inference.build import build_model
from moetrain.inference.mode import Mode
from moetrain.inference.sampling import Sampling, draw
from moetrain.kernels.build import Library, Units, load
from moetrain.model.config import ModelConfig, ScoreFunction
from moetrain.model.transformer import Transformer, initialize
from moetrain.ops.logprobs import chunked_logprobs
from moetrain.quant.apply import apply
from moetrain.quant.config import FormatName, GridName, QuantConfig
from tests.inference.test_native_model import ODD, hidden
from tests.ops.test_native import LIBRARIES, library_for
from tests.threads import num_threads

TINY: dict[str, Any] = {
    **{"hidden_size": 32, "num_heads": 2, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8},
    **{"qk_nope_head_dim": 11, "v_head_dim": 9, "moe_intermediate_size": 32, "intermediate_size": 40},
}
INT4, BF16 = QuantConfig(enabled=True), QuantConfig()
MXFP4 = QuantConfig(enabled=True, format=FormatName.mxfp4, grid=GridName.mx)
SHAPES: list[tuple[dict[str, Any], QuantConfig]] = [
    ({}, INT4),
    ({"q_lora_rank": None, "score_function": ScoreFunction.softmax, "num_groups": 2, "num_shared_experts": 2}, MXFP4),
    ({**ODD, "score_function": ScoreFunction.sqrt_softplus, "num_dense_layers": 2}, BF16),
    ({**TINY, "normalize_weights": False, "routed_scaling_factor": 2.0, "num_dense_layers": 0}, INT4),
]


def _pair(library: Library, fields: dict[str, Any], quant: QuantConfig) -> tuple[Transformer, Any]:
    """Return the training model and the same weights for generation."""
    config = ModelConfig(**{"vocab_size": 50, "num_layers": 3, **fields})
    source = Transformer(config, library=library)
    initialize(source, 1)
    for _, buffer in source.named_buffers():
        buffer.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    if quant.enabled:
        apply([layer.experts for _, layer in source.moe_layers()], quant)
    kind = {"library": library, "mode": Mode.deterministic, "device": torch.device("cpu")}
    made = build_model(source.state_dict(), config=config, quant=quant, **kind)  # type: ignore[arg-type]
    return source, made


def _sequences(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(50, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def _trained(source: Transformer, sequences: list[list[int]]) -> list[torch.Tensor]:
    """Return the hidden states of training, in rows that are padded as those of RL."""
    width = -(-max(map(len, sequences)) // 128) * 128
    tokens_BT, segments_BT = torch.zeros(len(sequences), width, dtype=torch.long), torch.zeros(len(sequences), width)
    for row, tokens in enumerate(sequences):
        tokens_BT[row, : len(tokens)] = torch.tensor(tokens)
        segments_BT[row, : len(tokens)] = 1
    segments_BT = segments_BT.long()
    positions_BT = torch.arange(width).expand_as(tokens_BT) * segments_BT
    states_BTD = source(tokens_BT, segments_BT=segments_BT, positions_BT=positions_BT).hidden_BTD
    return [states_D[: len(tokens)] for states_D, tokens in zip(states_BTD, sequences, strict=True)]


@pytest.fixture(params=LIBRARIES, ids=lambda param: f"{param[0]} {Units(param[1]).name}")
def library(request: pytest.FixtureRequest) -> Library:
    return library_for(*request.param)


@pytest.mark.parametrize(("fields", "quant"), SHAPES)
def test_hidden_states_are_those_of_training_in_any_chunks(
    fields: dict[str, Any], quant: QuantConfig, library: Library
) -> None:
    source, model = _pair(library, fields, quant)
    sequences = _sequences(1, 5, 70, 130)
    expected = _trained(source, sequences)
    for chunk in (1, 17, 200):
        assert all(map(torch.equal, hidden(model, sequences, chunk=chunk), expected))
    with num_threads(1):
        assert all(map(torch.equal, hidden(model, sequences[2:], chunk=64), expected[2:]))


def test_a_long_sequence_has_the_bits_of_training(library: Library) -> None:
    """Sums over keys restart every 512 units: here after 512 or 1024 of 1100 keys."""
    source, model = _pair(library, {**TINY, "num_layers": 2}, INT4)
    sequences = _sequences(1100, 40)
    expected = _trained(source, sequences)
    assert all(map(torch.equal, hidden(model, sequences, chunk=251), expected))


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logprobs_are_those_of_training(temperature: float, library: Library) -> None:
    source, model = _pair(library, {"num_layers": 1}, BF16)
    (states_ND,) = _trained(source, _sequences(37))
    sampling, divisors_N = Sampling(temperature=temperature), torch.full((37,), temperature or 1.0)
    for part in (slice(0, 37), slice(3, 4)):
        logits = model.logits(states_ND[part])
        number = len(logits)
        draws = draw(
            logits,
            samplings=[sampling] * number,
            allowed=[None] * number,
            uniforms_B=torch.linspace(0, 0.99, number),
            library=model.logprob_library,
        )
        expected, _ = chunked_logprobs(
            states_ND[part],
            source.lm_head.weight.detach(),
            targets_N=torch.tensor([each.token for each in draws]),
            temperatures_N=divisors_N[part],
            library=library,
        )
        assert [each.logprob for each in draws] == expected.tolist()


@pytest.mark.parametrize(
    ("is_given", "dtype", "found"),
    [(False, torch.bfloat16, "torch's kernels"), (True, torch.float32, "float32")],
)
def test_it_is_refused_without_native_kernels(is_given: bool, dtype: torch.dtype, found: str) -> None:
    config = ModelConfig(vocab_size=50, num_layers=1)
    source = Transformer(config)
    initialize(source, 1)
    library = load() if is_given else None
    with pytest.raises(ConfigError, match=rf"rollout\.mode is deterministic, .*{found}.*rollout\.mode=fast"):
        build_model(
            source.state_dict(),
            config=config,
            quant=BF16,
            library=library,
            dtype=dtype,
            mode=Mode.deterministic,
            device=torch.device("cpu"),
        )
