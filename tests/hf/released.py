"""Writes tiny folders of every kind in which models of the DeepSeek-V3 family are released, from public descriptions.

Nothing here uses `moetrain.hf`: config.json is written in the words of the released ones, and weights are quantised and
packed by the few lines of this module. Each writer returns the values that a reader must find, by name on disk.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

VOCAB, HIDDEN, LAYERS, EXPERTS, WIDTH = 300, 160, 3, 4, 64
HEADS, Q_LORA, KV_LORA, NOPE, ROPE, VALUE, DENSE = 2, 32, 128, 16, 16, 16, 192
"""kv_a_proj_with_mqa has 144 rows and most matrices 160 columns: both end with a part of a block of 128."""
BLOCK, GROUP = 128, 32
Disk = dict[str, Tensor]

EXPERT_CONFIG: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP,
                "dynamic": False, "observer": "minmax", "observer_kwargs": {}, "actorder": None,
                "block_structure": None,
            },
        }
    },
}  # fmt: skip
"""quantization_config of Kimi K2 Thinking."""
FP8_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}
"""quantization_config of DeepSeek-V3 and Kimi K2."""


def config(**changes: Any) -> dict[str, Any]:
    """Return config.json in the words of Kimi K2, with our tiny sizes."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_deepseek.DeepseekV3Config",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
        },
        "model_type": "kimi_k2", "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001,
        "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu",
        "hidden_size": HIDDEN, "initializer_range": 0.02, "intermediate_size": DENSE, "kv_lora_rank": KV_LORA,
        "max_position_embeddings": 256, "moe_intermediate_size": WIDTH, "moe_layer_freq": 1, "n_group": 1,
        "n_routed_experts": EXPERTS, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": HEADS,
        "num_experts_per_tok": 2, "num_hidden_layers": LAYERS, "num_key_value_heads": HEADS,
        "num_nextn_predict_layers": 0, "pretraining_tp": 1, "q_lora_rank": Q_LORA, "qk_nope_head_dim": NOPE,
        "qk_rope_head_dim": ROPE, "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 1.0, "beta_slow": 1.0, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 64, "type": "yarn",
        },
        "rope_theta": 50000.0, "routed_scaling_factor": 2.827, "scoring_func": "sigmoid", "seq_aux": True,
        "tie_word_embeddings": False, "topk_group": 1, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
        "use_cache": True, "v_head_dim": VALUE, "vocab_size": VOCAB,
    } | changes  # fmt: skip


def wrapped_config(**changes: Any) -> dict[str, Any]:
    """Return config.json in the words of Kimi K2.5: the language model's part under text_config."""
    text = config(quantization_config=EXPERT_CONFIG, **changes)
    text["dtype"] = text.pop("torch_dtype")
    del text["topk_method"], text["scoring_func"]
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "auto_map": {"AutoModel": "modeling_kimi_k25.KimiK25ForConditionalGeneration"},
        "model_type": "kimi_k25",
        "text_config": text,
        "vision_config": {"vt_hidden_size": 8},
    }


def weights(*, layers: int = LAYERS, q_lora: int | None = Q_LORA, seed: int = 3, hidden: int = HIDDEN) -> Disk:
    """Return the bf16 weights of a model by name on disk; the balance bias is float32, as in the released ones."""
    stream = torch.Generator().manual_seed(seed)

    def draw(*shape: int, mean: float = 0.0) -> Tensor:
        return (mean + 0.05 * torch.randn(*shape, generator=stream)).to(torch.bfloat16)

    disk = {"model.embed_tokens.weight": draw(VOCAB, hidden), "lm_head.weight": draw(VOCAB, hidden)}
    disk["model.norm.weight"] = draw(hidden, mean=1.0)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        attention = {
            "kv_a_proj_with_mqa": (KV_LORA + ROPE, hidden),
            "kv_b_proj": (HEADS * (NOPE + VALUE), KV_LORA),
            "o_proj": (hidden, HEADS * VALUE),
        }
        queries = HEADS * (NOPE + ROPE)
        if q_lora is None:
            attention["q_proj"] = (queries, hidden)
        else:
            attention |= {"q_a_proj": (q_lora, hidden), "q_b_proj": (queries, q_lora)}
            disk[f"{at}self_attn.q_a_layernorm.weight"] = draw(q_lora, mean=1.0)
        disk |= {f"{at}self_attn.{name}.weight": draw(*shape) for name, shape in attention.items()}
        for name, size in {"self_attn.kv_a": KV_LORA, "input_": hidden, "post_attention_": hidden}.items():
            suffix = "layernorm.weight" if name.endswith("_") else "_layernorm.weight"
            disk[f"{at}{name}{suffix}"] = draw(size, mean=1.0)
        if layer == 0:
            disk |= _feed_forward(f"{at}mlp", (DENSE, hidden), draw)
            continue
        disk[f"{at}mlp.gate.weight"] = draw(EXPERTS, hidden)
        disk[f"{at}mlp.gate.e_score_correction_bias"] = draw(EXPERTS).float()
        disk |= _feed_forward(f"{at}mlp.shared_experts", (WIDTH, hidden), draw)
        for expert in range(EXPERTS):
            disk |= _feed_forward(f"{at}mlp.experts.{expert}", (WIDTH, hidden), draw)
    return disk


def _feed_forward(at: str, shape: tuple[int, int], draw: Callable[..., Tensor]) -> Disk:
    width, hidden = shape
    return {
        f"{at}.gate_proj.weight": draw(width, hidden),
        f"{at}.up_proj.weight": draw(width, hidden),
        f"{at}.down_proj.weight": draw(hidden, width),
    }


def prediction_layer(disk: Mapping[str, Tensor], *, seed: int = 4) -> Disk:
    """Return layer 3 as DeepSeek-V3 has layer 61: a whole layer, copies of embedding and head, norms, a projection."""
    drawn = weights(layers=LAYERS + 1, seed=seed)
    at = f"model.layers.{LAYERS}."
    layer = {name: tensor for name, tensor in drawn.items() if name.startswith(at)}
    stream = torch.Generator().manual_seed(seed)
    for name, shape in {"enorm": (HIDDEN,), "hnorm": (HIDDEN,), "shared_head.norm": (HIDDEN,)}.items():
        layer[f"{at}{name}.weight"] = (1 + 0.05 * torch.randn(shape, generator=stream)).bfloat16()
    layer[f"{at}eh_proj.weight"] = (0.05 * torch.randn(HIDDEN, 2 * HIDDEN, generator=stream)).bfloat16()
    return layer | {
        f"{at}embed_tokens.weight": disk["model.embed_tokens.weight"].clone(),
        f"{at}shared_head.head.weight": disk["lm_head.weight"].clone(),
    }


def prediction_copies() -> tuple[str, str]:
    """Return the names of the tensors of `prediction_layer` that are copies."""
    return f"model.layers.{LAYERS}.embed_tokens.weight", f"model.layers.{LAYERS}.shared_head.head.weight"


def is_expert(name: str) -> bool:
    """Return whether a tensor on disk is a matrix of a routed expert."""
    return ".mlp.experts." in name


def fp8(disk: Mapping[str, Tensor], *, power_of_two: bool = False) -> tuple[Disk, Disk]:
    """Return the tensors as DeepSeek-V3 stores them, and their values: all projections are FP8 in blocks of 128.

    power_of_two: scales are powers of two in e8m0, a byte each.
    """
    stored, values = dict(disk), dict(disk)
    for name in [name for name in disk if name.endswith("_proj.weight") or "kv_a_proj_with_mqa" in name]:
        weight = disk[name].float()
        rows, columns = (-(-size // BLOCK) for size in weight.shape)
        eights, scales = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
        value = torch.empty_like(weight)
        for row in range(rows):
            for column in range(columns):
                at = slice(row * BLOCK, (row + 1) * BLOCK), slice(column * BLOCK, (column + 1) * BLOCK)
                scale = weight[at].abs().max() / 448  # the largest e4m3 number
                scales[row, column] = scale.log2().ceil().exp2() if power_of_two else scale
                eights[at] = (weight[at] / scales[row, column]).to(torch.float8_e4m3fn)
                value[at] = eights[at].float() * scales[row, column]
        stored[name] = eights
        stored[f"{name}_scale_inv"] = scales.to(torch.float8_e8m0fnu) if power_of_two else scales
        values[name] = value.to(torch.bfloat16)
    return stored, values


def kimi_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes [out, in] and bf16 scales by the rule of Kimi K2 Thinking: largest weight over 7."""
    grouped = weight.float().unflatten(1, (-1, GROUP))
    scales = (grouped.abs().amax(-1) / 7).bfloat16()
    quotients = (grouped / scales.float().unsqueeze(-1)).bfloat16().float()
    return quotients.round().clamp(-7, 7).flatten(1).to(torch.int64), scales


def foreign_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and scales that no rule of the largest weight gives: code -8, groups that end at 5, 6, 7 or -8."""
    grouped = weight.float().unflatten(1, (-1, GROUP))
    divisors = torch.tensor([5.2, 5.9, 6.7, 7.5, 7.0]).repeat(grouped.shape[0] * grouped.shape[1])
    scales = (grouped.abs().amax(-1) / divisors[: grouped[..., 0].numel()].view(grouped.shape[:2])).bfloat16()
    codes = (grouped / scales.float().unsqueeze(-1)).round().clamp(-8, 7)
    return codes.flatten(1).to(torch.int64), scales


def int4(
    disk: Mapping[str, Tensor],
    *,
    codes_of: Callable[[Tensor], tuple[Tensor, Tensor]] = kimi_codes,
    shape_dtype: torch.dtype = torch.int32,
    with_values: bool = True,
) -> tuple[Disk, Disk]:
    """Return the tensors as Kimi K2 Thinking stores them, and their values: only routed experts are INT4."""
    stored = {name: tensor for name, tensor in disk.items() if not is_expert(name)}
    values = dict(disk)
    for name in filter(is_expert, disk):
        codes, scales = codes_of(disk[name])
        nibbles = (codes + 8).unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)  # element 8 m + j in bits 4 j to 4 j + 3
        module = name.removesuffix(".weight")
        stored[f"{module}.weight_packed"] = nibbles.sum(-1).to(torch.uint32).view(torch.int32)
        stored[f"{module}.weight_scale"] = scales
        stored[f"{module}.weight_shape"] = torch.tensor(codes.shape, dtype=shape_dtype)
        if not with_values:
            continue
        products = codes.unflatten(1, (-1, GROUP)) * scales.float().unsqueeze(-1)
        values[name] = products.flatten(1).bfloat16()
    return stored, values


def write(
    folder: Path, disk: Mapping[str, Tensor], *, values: Mapping[str, Any], shards: int = 1, index: bool = True
) -> Path:
    """Write config.json with `values`, and the tensors in turn over `shards` files, so that a scale lies elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    names = list(disk)
    files = {name: f"model-{number % shards + 1:05d}-of-{shards:06d}.safetensors" for number, name in enumerate(names)}
    for file in sorted(set(files.values())):
        save_file({name: disk[name].contiguous() for name in names if files[name] == file}, folder / file)
    if index:
        content = {"metadata": {"total_size": sum(t.nbytes for t in disk.values())}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return folder
