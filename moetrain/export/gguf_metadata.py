"""The metadata of a GGUF file: the shape of the model (architecture `deepseek2`), its tokenizer and its chat template.

llama.cpp fills some missing keys silently with other values, so every key that it reads for this architecture is
written.
"""

import json
from collections.abc import Iterator
from typing import Any

from moetrain.chat.pieces import BOS, EOS, PAD, UNK
from moetrain.data.tokenizer import SPLIT_PATTERN, Tokenizer
from moetrain.errors import ConfigError
from moetrain.model.config import ModelConfig, ScoreFunction
from moetrain.model.gate_scale import routed_scaling_factor

ARCHITECTURE = "deepseek2"
_GATING = {ScoreFunction.softmax: 1, ScoreFunction.sigmoid: 2}
_YARN_LOG_FACTOR = 0.1
"""llama.cpp divides `yarn_log_multiplier` by this number when it loads the architecture."""

_GPT2 = "gpt-2"
_SPLITS = {
    # Differs from gpt-2 in digits, which no merge of such a vocabulary joins, and in contractions (docs/exports.md).
    SPLIT_PATTERN: _GPT2,
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": (
        "qwen2"
    ),
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "dbrx",  # llama-bpe has the same pattern, but adds a token at the start of a text
}
"""llama.cpp's name of each pattern that splits text before the merges."""
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5

Metadata = dict[str, int | float | bool | str | list[str] | list[int]]


def model_metadata(model: ModelConfig) -> Metadata:
    """Return the keys that describe the shape of the model."""
    values: Metadata = {
        "vocab_size": model.vocab_size,
        "block_count": model.num_layers,
        "context_length": model.max_position_embeddings,
        "embedding_length": model.hidden_size,
        "feed_forward_length": model.intermediate_size,
        "leading_dense_block_count": model.num_dense_layers,
        "attention.head_count": model.num_heads,
        "attention.head_count_kv": 1,  # all heads share one latent
        "attention.layer_norm_rms_epsilon": float(model.rms_norm_eps),
        "attention.q_lora_rank": model.q_lora_rank or 0,
        "attention.kv_lora_rank": model.kv_lora_rank,
        "attention.key_length": model.kv_lora_rank + model.qk_rope_head_dim,
        "attention.value_length": model.kv_lora_rank,
        "attention.key_length_mla": model.qk_head_dim,
        "attention.value_length_mla": model.v_head_dim,
        "rope.dimension_count": model.qk_rope_head_dim,
        "rope.freq_base": float(model.rope_theta),
        "expert_count": model.num_experts,
        "expert_used_count": model.num_experts_per_token,
        "expert_group_count": model.num_groups,
        "expert_group_used_count": model.num_groups_per_token,
        "expert_feed_forward_length": model.moe_intermediate_size,
        "expert_shared_count": model.num_shared_experts,
        "expert_weights_scale": float(routed_scaling_factor(model)),
        "expert_weights_norm": model.normalize_weights,
        "expert_gating_func": _GATING[model.score_function],
        **_rope_scaling(model),
    }
    return {f"{ARCHITECTURE}.{key}": value for key, value in values.items()}


def _rope_scaling(model: ModelConfig) -> Metadata:
    yarn = model.yarn
    if yarn.factor <= 1:
        return {"rope.scaling.type": "none"}
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(yarn.factor),
        "rope.scaling.original_context_length": yarn.original_max_position,
        "rope.scaling.yarn_beta_fast": float(yarn.beta_fast),
        "rope.scaling.yarn_beta_slow": float(yarn.beta_slow),
        "rope.scaling.yarn_log_multiplier": _YARN_LOG_FACTOR * yarn.mscale_all_dim,
    }


def tokenizer_metadata(tokenizer: Tokenizer, *, num_rows: int) -> Metadata:
    """Return the keys of the tokenizer and of the chat template; `num_rows` is the number of rows of the embedding.

    Raises ConfigError when llama.cpp has no such tokenizer.
    """
    content = tokenizer.content()
    bpe = content["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe.get("merges", ())]
    tokens = [f"[PAD{id_}]" for id_ in range(num_rows)]
    types = [_UNUSED] * num_rows
    for token, id_ in bpe.get("vocab", {}).items():
        tokens[id_], types[id_] = token, _NORMAL
    for added in content["added_tokens"]:
        is_control = added["special"] or added["id"] in tokenizer.special_names
        tokens[added["id"]], types[added["id"]] = added["content"], _CONTROL if is_control else _USER_DEFINED
    ids = tokenizer.special_ids
    values: Metadata = {
        "model": "gpt2",
        "pre": _split_name(content),
        "tokens": tokens,
        "token_type": types,
        "merges": merges,
        "bos_token_id": ids[BOS],
        "eos_token_id": ids[EOS],
        "padding_token_id": ids[PAD],
        "add_bos_token": False,  # chats and prompts state the token where the model was trained with it
        "add_eos_token": False,
    }
    if UNK in ids:
        values["unknown_token_id"] = ids[UNK]
    template = tokenizer.template_or_none
    if template is not None and template.syntax.end in ids:
        values["eot_token_id"] = ids[template.syntax.end]
    named: Metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    return named | ({"tokenizer.chat_template": tokenizer.jinja} if tokenizer.jinja else {})


def _split_name(content: dict[str, Any]) -> str:
    """Return llama.cpp's name for the way that a tokenizer splits text before the merges."""
    kind = content["model"].get("type")
    if kind not in ("BPE", None) or content["model"].get("byte_fallback") or content["model"].get("ignore_merges"):
        raise ConfigError(_refusal(f"its model is {kind}, and byte-level BPE with merges in order is required"))
    if content.get("normalizer"):
        raise ConfigError(_refusal(f"it normalises text ({content['normalizer'].get('type')})"))
    steps = list(_steps(content.get("pre_tokenizer") or {}))
    last = steps.pop() if steps else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise ConfigError(_refusal("it does not end in ByteLevel without a prefix space"))
    if last.get("use_regex"):
        if not steps:
            return _GPT2
    elif len(steps) == 1 and steps[0].get("type") == "Split" and not steps[0].get("invert"):
        pattern = steps[0]["pattern"].get("Regex")
        if steps[0].get("behavior") == "Isolated" and pattern in _SPLITS:
            return _SPLITS[pattern]
    raise ConfigError(_refusal(f"it splits text as {json.dumps(steps, ensure_ascii=False)[:200]}"))


def _steps(pre_tokenizer: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if pre_tokenizer.get("type") == "Sequence":
        for step in pre_tokenizer["pretokenizers"]:
            yield from _steps(step)
    elif pre_tokenizer:
        yield pre_tokenizer


def _refusal(why: str) -> str:
    return (
        f"export.format=gguf: the tokenizer is unknown to llama.cpp: {why}; "
        "train one with moetrain, or export as safetensors (export.format=quantized)"
    )
