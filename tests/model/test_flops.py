"""Counts against the published models and against the parameters of a real one."""

from pathlib import Path

import pytest
import yaml

from moetrain.model.config import BalanceConfig, ModelConfig, YarnConfig
from moetrain.model.flops import flops_per_token, num_parameters
from moetrain.model.transformer import Transformer

PRESETS = Path(__file__).parents[2] / "configs" / "model"


def preset(name: str) -> ModelConfig:
    values = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
    if "yarn" in values:
        values["yarn"] = YarnConfig(**values["yarn"])
    if "balance" in values:
        values["balance"] = BalanceConfig(**values["balance"])
    return ModelConfig(**values)


@pytest.mark.parametrize(
    ("name", "total", "routed", "active_with_head"),
    [
        ("moonlight_16b", 15_960_108_544, 14_394_851_328, 2_579_230_208),
        ("deepseek_v3", 671_026_404_352, 653_908_770_816, 36_625_603_584),
        ("kimi_k2", 1_026_408_209_408, 1_014_686_023_680, 31_687_072_768),
        ("kimi_k2_thinking", 1_026_408_209_408, 1_014_686_023_680, 31_687_072_768),
    ],
)
def test_presets_have_the_published_parameter_counts(name: str, total: int, routed: int, active_with_head: int) -> None:
    counts = num_parameters(preset(name))
    assert (counts.total, counts.routed, counts.active_with_head) == (total, routed, active_with_head)
    assert counts.active == counts.active_with_head - preset(name).vocab_size * preset(name).hidden_size


def test_presets_have_the_published_softmax_scales() -> None:
    for name, squared_mscale in (("deepseek_v3", 1.8739), ("kimi_k2", 1.8133), ("kimi_k2_thinking", 2.0047)):
        assert preset(name).softmax_scale * 192**0.5 == pytest.approx(squared_mscale, abs=1e-4)
    assert preset("moonlight_16b").softmax_scale == pytest.approx(192**-0.5)


@pytest.mark.parametrize("config", [ModelConfig(), ModelConfig(q_lora_rank=None, num_shared_experts=2)])
def test_counts_are_those_of_the_model_that_is_built(config: ModelConfig) -> None:
    assert num_parameters(config).total == sum(p.numel() for p in Transformer(config).parameters())


def test_flops_are_six_a_parameter_and_causal_attention() -> None:
    config = ModelConfig()
    attention = 3 * 4 * 4 * (48 + 32) * 2 * (512 / 2)
    assert flops_per_token(config, 512) == 6 * num_parameters(config).active_with_head + attention
