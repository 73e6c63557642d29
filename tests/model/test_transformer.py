"""Logits against transformers' own DeepseekV3ForCausalLM, and what must not change them."""

from dataclasses import replace

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from moetrain.model.config import ModelConfig, YarnConfig
from moetrain.model.hf import to_hf_config
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
