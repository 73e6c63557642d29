"""Logits against transformers' own DeepseekV3ForCausalLM, and what must not change them."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from moetrain.errors import ConfigError
from moetrain.hf.shape import to_hf_config
from moetrain.model.config import ModelConfig, ScoreFunction, YarnConfig
from moetrain.model.router import score
from moetrain.model.transformer import Transformer, initialize

TINY = ModelConfig(
    vocab_size=97,
    hidden_size=48,
    num_layers=3,
    num_heads=3,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=12,
    intermediate_size=40,
    moe_intermediate_size=16,
    num_experts=16,
    num_experts_per_token=3,
    num_shared_experts=2,
    initializer_range=0.1,
    max_position_embeddings=64,
)
VARIANTS = {
    "q_lora": TINY,
    "no_q_lora": replace(TINY, q_lora_rank=None),
    "yarn_32": replace(TINY, yarn=YarnConfig(factor=32, original_max_position=16)),
    "yarn_40": replace(TINY, yarn=YarnConfig(factor=40, original_max_position=16, beta_fast=32), rope_theta=10000.0),
    "yarn_64": replace(TINY, yarn=YarnConfig(factor=64, original_max_position=16)),
    "yarn_mscale": replace(TINY, yarn=YarnConfig(factor=8, original_max_position=16, mscale=0.7)),
    "groups": replace(TINY, num_groups=8, num_groups_per_token=3),
    "eps": replace(TINY, rms_norm_eps=1e-6),
    "all_dense": replace(TINY, num_dense_layers=3),
    "given_scale": replace(TINY, routed_scaling_factor=1.7, normalize_weights=False),
}


def make(config: ModelConfig, *, seed: int = 0, bias_std: float = 0.05) -> Transformer:
    model = Transformer(config, compute_dtype=torch.float32)
    initialize(model, seed)
    stream = torch.Generator().manual_seed(seed)
    for _, layer in model.moe_layers():
        layer.gate.e_score_correction_bias.normal_(std=bias_std, generator=stream)
    return model


def logits_of(model: Transformer, tokens_BT: torch.Tensor, *, segments_BT=None, positions_BT=None) -> torch.Tensor:
    if segments_BT is None:
        segments_BT = torch.ones_like(tokens_BT)
    if positions_BT is None:
        positions_BT = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
    return model.logits(model(tokens_BT, segments_BT=segments_BT, positions_BT=positions_BT).hidden_BTD)


def random_tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_those_of_transformers_on_the_same_weights(name: str) -> None:
    config = VARIANTS[name]
    ours = make(config)
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**to_hf_config(config))).eval()
    state = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == state
    theirs.load_state_dict(ours.state_dict())
    tokens_BT = random_tokens(2, 40)
    with torch.no_grad():
        expected = theirs(tokens_BT).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(logits_of(ours, tokens_BT), expected, atol=1e-5, rtol=0)


def test_loss_does_not_depend_on_how_documents_are_packed() -> None:
    model = make(TINY)
    documents = [random_tokens(1, length, seed=length) for length in (7, 19, 1, 30, 12)]
    lengths = [document.shape[1] for document in documents]
    padding = 6
    packed_BT = torch.cat([*documents, torch.zeros(1, padding, dtype=torch.int64)], 1)
    segments = [torch.full((length,), index + 1) for index, length in enumerate(lengths)]
    segments_BT = torch.cat([*segments, torch.zeros(padding, dtype=torch.int64)])[None]
    positions_BT = torch.cat([torch.arange(length) for length in [*lengths, padding]])[None]
    packed = model(packed_BT, segments_BT=segments_BT, positions_BT=positions_BT)
    alone = [
        model(tokens, segments_BT=torch.ones_like(tokens), positions_BT=torch.arange(tokens.shape[1])[None])
        for tokens in documents
    ]
    together = torch.cat([output.hidden_BTD for output in alone], 1)
    torch.testing.assert_close(packed.hidden_BTD[:, :-padding], together, atol=1e-5, rtol=1e-5)
    assert torch.equal(packed.counts_LE, torch.stack([output.counts_LE for output in alone]).sum(0))
    balance_loss = torch.stack([output.balance_loss for output in alone]).sum()
    torch.testing.assert_close(packed.balance_loss, balance_loss)
    entropy = sum(output.entropy_L * length for output, length in zip(alone, lengths, strict=True)) / sum(lengths)
    torch.testing.assert_close(packed.entropy_L, entropy)


def test_rows_of_a_batch_do_not_see_each_other() -> None:
    model = make(TINY)
    tokens_BT = random_tokens(3, 20)
    rows = torch.cat([logits_of(model, row[None]) for row in tokens_BT])
    torch.testing.assert_close(logits_of(model, tokens_BT).flatten(), rows.flatten(), atol=1e-5, rtol=1e-5)


def test_every_parameter_has_a_gradient_in_bf16() -> None:
    model = Transformer(TINY)
    initialize(model, 0)
    tokens_BT = random_tokens(1, 3)  # 9 choices among 16 experts: some have no token
    output = model(tokens_BT, segments_BT=torch.ones_like(tokens_BT), positions_BT=torch.arange(3)[None])
    assert (output.counts_LE == 0).any()
    (model.logits(output.hidden_BTD[0]).sum() + output.balance_loss).backward()
    assert output.hidden_BTD.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


def test_bf16_stays_near_fp32() -> None:
    """Without experts: with them a tie broken the other way is a different function."""
    config = replace(TINY, num_dense_layers=3, initializer_range=0.02)
    tokens_BT = random_tokens(2, 40)
    exact, rounded = Transformer(config, compute_dtype=torch.float32), Transformer(config)
    for model in (exact, rounded):
        initialize(model, 0)
    expected = logits_of(exact, tokens_BT)
    assert (logits_of(rounded, tokens_BT) - expected).norm() < 0.02 * expected.norm()


def test_initial_weights_are_the_same_for_every_slice_of_experts() -> None:
    whole = Transformer(TINY)
    initialize(whole, 5)
    state = whole.state_dict()
    for start in range(0, 16, 4):
        part = Transformer(TINY, expert_slice=slice(start, start + 4))
        initialize(part, 5)
        for name, tensor in part.state_dict().items():
            expected = state[name][start : start + 4] if ".experts." in name else state[name]
            assert torch.equal(tensor, expected), name


def test_initial_weights_are_a_function_of_the_seed_with_the_configs_deviation() -> None:
    first, again, other = Transformer(TINY), Transformer(TINY), Transformer(TINY)
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        initialize(model, seed)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    for (name, ours), theirs in zip(first.named_parameters(), other.parameters(), strict=True):
        if ours.ndim == 1:
            assert (ours == 1).all(), name
        else:
            assert not torch.equal(ours, theirs), name
            assert ours.std().item() == pytest.approx(TINY.initializer_range, rel=0.15), name


def test_a_model_on_the_meta_device_becomes_the_same_model() -> None:
    with torch.device("meta"):
        model = Transformer(TINY, compute_dtype=torch.float32)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    model.to_empty(device="cpu")
    initialize(model, 0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), make(TINY).parameters(), strict=True))
    tokens_BT = random_tokens(2, 10)
    expected = logits_of(make(TINY, bias_std=0.0), tokens_BT)
    torch.testing.assert_close(logits_of(model, tokens_BT), expected, atol=0, rtol=0)


def test_moe_layers_are_listed_by_name_in_order() -> None:
    assert [name for name, _ in Transformer(TINY).moe_layers()] == ["model.layers.1.mlp", "model.layers.2.mlp"]


def test_a_shape_whose_routed_factor_cannot_be_derived_is_refused_when_built() -> None:
    with pytest.raises(ConfigError, match="routed_scaling_factor is null"):
        Transformer(replace(TINY, normalize_weights=False))


def test_every_score_function_is_its_formula_and_reaches_the_logits() -> None:
    logits = [0.7, -1.2, 2.5, 0.1]
    total = sum(math.exp(logit) for logit in logits)
    formulas = {
        ScoreFunction.sigmoid: [1 / (1 + math.exp(-logit)) for logit in logits],
        ScoreFunction.softmax: [math.exp(logit) / total for logit in logits],
        ScoreFunction.sqrt_softplus: [math.sqrt(math.log(1 + math.exp(logit))) for logit in logits],
    }
    assert set(formulas) == set(ScoreFunction)
    for function, expected in formulas.items():
        assert score(torch.tensor([logits]), function)[0].tolist() == pytest.approx(expected, rel=1e-6)
    seen = [logits_of(make(replace(TINY, score_function=function)), random_tokens(1, 5)) for function in formulas]
    for index, first in enumerate(seen):
        assert all((first - other).abs().max() > 1e-4 for other in seen[index + 1 :])
