"""The released models as presets: values of their configs, parameters to the unit, transformers' names and shapes."""

from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from moetrain.compose import compose
from moetrain.hf.shape import to_hf_config
from moetrain.model.config import ModelConfig
from moetrain.model.flops import num_parameters
from moetrain.model.transformer import Transformer

# total, routed, active with the head and without the input embedding, entries of balance biases
COUNTS = {
    "moonlight_16b": (15_960_108_544, 14_394_851_328, 2_579_230_208, 1_664),
    "deepseek_v3": (671_026_404_352, 653_908_770_816, 36_625_603_584, 14_848),
    "kimi_k2": (1_026_408_209_408, 1_014_686_023_680, 31_687_072_768, 23_040),
    "kimi_k2_thinking": (1_026_408_209_408, 1_014_686_023_680, 31_687_072_768, 23_040),
}
_K2 = {
    "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 64, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 384, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827, "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "norm_topk_prob": True, "seq_aux": True, "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "vocab_size": 163840, "tie_word_embeddings": False, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "kimi_k2": _K2,
    "kimi_k2_thinking": {**_K2, "rms_norm_eps": 1e-5, "max_position_embeddings": 262144},
    "deepseek_v3": {
        **_K2, "num_attention_heads": 128, "n_routed_experts": 256, "n_group": 8, "topk_group": 4,
        "routed_scaling_factor": 2.5, "first_k_dense_replace": 3, "vocab_size": 129280, "aux_loss_alpha": 0.0001,
        "max_position_embeddings": 163840, "initializer_range": 0.006,
    },
    "moonlight_16b": {
        **_K2, "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16, "q_lora_rank": None,
        "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "routed_scaling_factor": 2.446,
        "intermediate_size": 11264, "moe_intermediate_size": 1408, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
    },
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "rope_theta": 50000.0, "factor": 32.0, "original_max_position_embeddings": 4096,
    "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
ROPE: dict[str, dict[str, Any]] = {
    "kimi_k2": _YARN,
    "kimi_k2_thinking": {**_YARN, "factor": 64.0},
    "deepseek_v3": {**_YARN, "rope_theta": 10000.0, "factor": 40.0, "beta_fast": 32.0},
    "moonlight_16b": {"rope_type": "default", "rope_theta": 50000.0},
}


def _preset(name: str) -> ModelConfig:
    config: ModelConfig = compose("pretrain", [f"model={name}"]).model
    return config


@pytest.mark.parametrize("name", COUNTS)
def test_a_preset_has_the_parameters_of_the_released_model_to_the_unit(name: str) -> None:
    config = _preset(name)
    with torch.device("meta"):
        model = Transformer(config)
    counts = num_parameters(config)
    total = sum(param.numel() for param in model.parameters())
    routed = sum(param.numel() for _, layer in model.moe_layers() for param in layer.experts.parameters())
    biases = sum(layer.gate.e_score_correction_bias.numel() for _, layer in model.moe_layers())
    assert (total, routed, counts.active_with_head, biases) == COUNTS[name]
    assert (counts.total, counts.routed) == (total, routed)


@pytest.mark.parametrize("name", COUNTS)
def test_a_preset_has_the_names_and_shapes_that_transformers_expects(name: str) -> None:
    config = _preset(name)
    with torch.device("meta"):
        ours = Transformer(config).state_dict()
        theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**to_hf_config(config))).state_dict()
    assert {key: tuple(t.shape) for key, t in ours.items()} == {key: tuple(t.shape) for key, t in theirs.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_preset_has_the_values_of_the_released_config(name: str) -> None:
    values = to_hf_config(_preset(name))
    assert {key: values[key] for key in CONFIGS[name]} == CONFIGS[name]
    assert values["rope_parameters"] == ROPE[name]
