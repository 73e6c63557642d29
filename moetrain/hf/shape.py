"""Converts a model's shape to and from the config.json of DeepseekV3ForCausalLM. Imports no torch or transformers."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moetrain.errors import CheckpointError, ConfigError
from moetrain.hf.rope import read_rope
from moetrain.model.config import ModelConfig, ScoreFunction, YarnConfig
from moetrain.model.gate_scale import routed_scaling_factor

_MTP = "num_nextn_predict_layers"
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_dense_layers": "first_k_dense_replace",
    "num_mtp_layers": _MTP,
    "num_heads": "num_attention_heads",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "intermediate_size": "intermediate_size",
    "moe_intermediate_size": "moe_intermediate_size",
    "num_experts": "n_routed_experts",
    "num_experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
    "num_groups": "n_group",
    "num_groups_per_token": "topk_group",
    "normalize_weights": "norm_topk_prob",
    "routed_scaling_factor": "routed_scaling_factor",
    "rms_norm_eps": "rms_norm_eps",
    "initializer_range": "initializer_range",
    "max_position_embeddings": "max_position_embeddings",
}
_REQUIRED_VALUES = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "topk_method": "noaux_tc",
}
_ABSENT_IF_NULL = ("topk_method", "scoring_func", "rope_interleave", "num_key_value_heads", _MTP)
_OPTIONAL = ("initializer_range", _MTP)
_MAY_BE_NULL = ("q_lora_rank",)
_SWITCHES = ("norm_topk_prob",)
_FRACTIONS = ("routed_scaling_factor", "rms_norm_eps", "initializer_range")
_ARCHITECTURE = "DeepseekV3ForCausalLM"
_MODEL_TYPES = ("deepseek_v3", "kimi_k2")
_WRAPPERS = ("kimi_k25",)
"""Model types whose config must have the language model's under `text_config`, beside that of an image encoder."""
_MOST = {"num_hidden_layers": 1024, _MTP: 1024, "n_routed_experts": 8192}
"""Largest numbers that are read: each layer and expert has names, and a damaged number would take hours."""
_TEXT_CONFIG = "text_config"


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """Return the model's fields of config.json. The exporter adds token ids and dtype."""
    values = {theirs: vars(config)[ours] for ours, theirs in _FIELDS.items()}
    is_extended = config.yarn.factor > 1
    rope = _yarn(config) if is_extended else {"rope_type": "default", "rope_theta": config.rope_theta}
    return {
        "architectures": [_ARCHITECTURE],
        "model_type": _MODEL_TYPES[0],
        **values,
        "num_key_value_heads": config.num_heads,
        "routed_scaling_factor": routed_scaling_factor(config),
        "scoring_func": config.score_function.value,
        "rope_parameters": rope,
        "aux_loss_alpha": config.balance.sequence_loss,
        "seq_aux": True,
        "attention_dropout": 0.0,
        "use_cache": True,
        **_REQUIRED_VALUES,
    }


def _yarn(config: ModelConfig) -> dict[str, Any]:
    yarn = config.yarn
    return {
        "rope_type": "yarn",
        "rope_theta": config.rope_theta,
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_position,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }


def vllm_overrides(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of config.json to override so that vLLM on a CPU computes the model.

    Without YaRN, vLLM 0.32 takes a kernel that rotates the queries of DeepSeek's attention wrongly on a CPU. YaRN with
    factor 1 has the same frequencies and takes other code.
    """
    if config.yarn.factor > 1:
        return {}
    same = YarnConfig(factor=1.0, original_max_position=config.max_position_embeddings)
    return {"rope_parameters": _yarn(replace(config, yarn=same))}


def from_hf_config(values: Mapping[str, Any]) -> ModelConfig:
    """Return the model config from a config.json of the DeepSeek-V3 family.

    Both forms of rope parameters are read, those of transformers 4 and 5, and of a model with an image encoder the
    language model's part. `auto_map` is ignored: no code of the folder is ever run. Raises CheckpointError when the
    file names another architecture, or a setting that this model does not compute.
    """
    values = text_config(values)
    _check_architecture(values)
    values = {name: value for name, value in values.items() if name not in _ABSENT_IF_NULL or value is not None}
    for name, required in _REQUIRED_VALUES.items():
        if values.get(name, required) != required:
            raise CheckpointError(f"config.json: {name} is {values[name]!r}: only {required!r} is supported")
    heads = values.get("num_attention_heads")
    if values.get("num_key_value_heads", heads) != heads:
        raise CheckpointError(
            f"config.json: num_key_value_heads is {values['num_key_value_heads']}: only the value of "
            f"num_attention_heads ({heads}) is supported"
        )
    missing = [name for name in _FIELDS.values() if name not in values and name not in _OPTIONAL]
    if missing:
        raise CheckpointError(
            f"config.json: {', '.join(missing)} missing: give the config.json of a model of the DeepSeek-V3 family"
        )
    try:
        score_function = ScoreFunction(values.get("scoring_func", "sigmoid"))
    except ValueError as error:
        raise CheckpointError(
            f"config.json: scoring_func is {values['scoring_func']!r}: give one of {', '.join(ScoreFunction)}"
        ) from error
    for name in _FIELDS.values():
        value = values.get(name)
        if name in _SWITCHES and not isinstance(value, bool):
            raise CheckpointError(f"config.json: {name} is {value!r}: give true or false")
        if name not in _SWITCHES and (isinstance(value, bool) or not isinstance(value, int | float | None)):
            raise CheckpointError(f"config.json: {name} is {value!r}: give a number")
        if isinstance(value, float) and name not in _FRACTIONS:
            raise CheckpointError(f"config.json: {name} is {value!r}: give a whole number")
        if name in _MOST and (value or 0) > _MOST[name]:
            raise CheckpointError(f"config.json: {name} is {value}: give at most {_MOST[name]}")
    fields = {ours: values[theirs] for ours, theirs in _FIELDS.items() if theirs in values}
    nulls = [theirs for ours, theirs in _FIELDS.items() if values.get(theirs, 0) is None and ours not in _MAY_BE_NULL]
    if nulls:
        raise CheckpointError(f"config.json: {nulls[0]} is null: give a number")
    theta, yarn = read_rope(values)
    try:
        return ModelConfig(**fields, score_function=score_function, rope_theta=theta, yarn=yarn)
    except ConfigError as error:
        raise CheckpointError(f"config.json: {error}") from error


def text_config(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the language model's fields of a config.json: those under `text_config` if it is a wrapper's, else all.

    Raises CheckpointError when the file holds no object, or a wrapper has no such fields.
    """
    if not isinstance(values, Mapping):
        raise CheckpointError(f"config.json holds a {type(values).__name__}: give an object with the model's fields")
    inner = values.get(_TEXT_CONFIG)
    is_known = isinstance(inner, Mapping) and inner.get("model_type") in _MODEL_TYPES and "hidden_size" not in values
    if values.get("model_type") not in _WRAPPERS and not is_known:
        return values
    if not isinstance(inner, Mapping):
        raise CheckpointError(
            f"config.json: {_TEXT_CONFIG} is {inner!r}: a model of model_type {values['model_type']} has the fields of "
            "its language model there"
        )
    return inner


def _check_architecture(values: Mapping[str, Any]) -> None:
    """Raise CheckpointError when the file names an architecture that this package does not compute."""
    architectures, model_type = values.get("architectures"), values.get("model_type")
    named, is_known = _ARCHITECTURE, True
    if architectures:
        named = ", ".join(map(str, architectures)) if isinstance(architectures, list) else str(architectures)
        is_known = named == _ARCHITECTURE
    if is_known:
        named, is_known = f"of model_type {model_type}", model_type is None or model_type in _MODEL_TYPES
    if not is_known:
        raise CheckpointError(
            f"config.json: architecture {named} is not supported; moetrain reads {_ARCHITECTURE} "
            "(DeepSeek-V3, Kimi K2, Moonlight): give a folder of such a model"
        )
