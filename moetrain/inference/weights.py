"""Weights in the form for generation: cast once, experts as codes and scales, MLA projections ready for absorption.

D hidden, H heads, C kv_lora, R rope, E experts, F expert width, N rows of a matrix. X, O, I, G, W as in `quant`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace

import torch

from moetrain.model.config import ModelConfig
from moetrain.quant.codec_int4 import CODE_OFFSET, pack, unpack
from moetrain.quant.config import QuantConfig
from moetrain.quant.grids import Quantized, dequantize, quantize
from moetrain.quant.masters import CodeReader

Tensors = Mapping[str, torch.Tensor] | Mapping[str, torch.Tensor | Quantized]


class TensorsWithCodes(Mapping[str, "torch.Tensor | Quantized"]):
    """Tensors by name, in which those that are stored as codes and scales are returned as such. Nothing is cached."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], codes: CodeReader) -> None:
        """Take codes from `codes` where it has them, and all other tensors from `tensors`."""
        self._tensors = tensors
        self._codes = codes
        self._num_experts = codes.packed_experts()

    def __getitem__(self, name: str) -> "torch.Tensor | Quantized":
        """Return a tensor; a packed one as codes and scales of all its experts."""
        if name not in self._num_experts:
            return self._tensors[name]
        return self._codes.codes(name, first=0, last=self._num_experts[name])

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._tensors)


@dataclass(frozen=True, kw_only=True)
class PackedInt4:
    """Matrices as INT4 codes, eight per int32 word in the layout of `quant.codec_int4`, and bf16 scales."""

    words_XOW: torch.Tensor
    scales_XOG: torch.Tensor

    def __getitem__(self, expert: int) -> Quantized:
        """Return the slice at index `expert` of the first axis."""
        return Quantized(codes_XOI=unpack(self.words_XOW[expert]), scales_XOG=self.scales_XOG[expert])


ExpertWeight = torch.Tensor | Quantized | PackedInt4
"""A matrix of all experts of a layer: plain, or as codes and scales. On a GPU, INT4 codes are packed."""


_CODES_PER_WORD = 8


@dataclass(kw_only=True)
class LayerWeights:
    """One transformer block. Matrices are [out, in] unless their name gives the axes.

    up_k_HNC, up_v_HCV: the key and value parts of kv_b_proj by head, to be absorbed into the query and the output
    (arXiv 2405.04434, section 2.1.2).
    """

    input_norm_D: torch.Tensor
    post_norm_D: torch.Tensor
    q_a: torch.Tensor | None
    q_a_norm: torch.Tensor | None
    q_b: torch.Tensor
    kv_a: torch.Tensor
    kv_a_norm_C: torch.Tensor
    up_k_HNC: torch.Tensor
    up_v_HCV: torch.Tensor
    o_proj: torch.Tensor
    dense_gate_up: torch.Tensor
    dense_down: torch.Tensor
    router_ED: torch.Tensor | None = None
    router_bias_E: torch.Tensor | None = None
    experts: tuple[ExpertWeight, ExpertWeight] | None = None
    """gate_up [E, 2F, D] and down [E, D, F]."""

    def to(self, device: torch.device) -> "LayerWeights":
        """Return the block on `device`."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "experts"}
        moved = {name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None}
        experts = self.experts and (_to(self.experts[0], device), _to(self.experts[1], device))
        return replace(self, **moved, experts=experts)


@dataclass(kw_only=True)
class ModuleWeights:
    """The first module of multi-token prediction; see `model.mtp`.

    join_D2: [D, 2D], which multiplies the embedding, then the hidden state.
    """

    embed_norm_D: torch.Tensor
    hidden_norm_D: torch.Tensor
    join_D2: torch.Tensor
    layer: LayerWeights
    norm_D: torch.Tensor

    def to(self, device: torch.device) -> "ModuleWeights":
        """Return the module on `device`."""
        moved = {field.name: getattr(self, field.name).to(device) for field in fields(self)}
        return ModuleWeights(**moved)


@dataclass(kw_only=True)
class InferenceWeights:
    """A whole model for generation. dtype: dtype of the matrix products. module: makes drafts; None for none."""

    config: ModelConfig
    dtype: torch.dtype
    embed_VD: torch.Tensor
    norm_D: torch.Tensor
    head_VD: torch.Tensor
    layers: list[LayerWeights]
    module: ModuleWeights | None = None

    @property
    def device(self) -> torch.device:
        """Device of the weights, on which generation computes."""
        return self.embed_VD.device


def expert_weight(weight: torch.Tensor | Quantized, *, quant: QuantConfig, dtype: torch.dtype) -> ExpertWeight:
    """Return expert weights as generation holds them: codes and scales if they are quantised, else cast."""
    if isinstance(weight, Quantized):
        return weight
    return quantize(weight, grid=quant.grid, group_size=quant.group_size) if quant.enabled else weight.to(dtype)


def multiplied(weight: ExpertWeight, expert: int, *, dtype: torch.dtype) -> torch.Tensor:
    """Return the matrix of one expert as it is multiplied: from codes and scales if quantised."""
    return weight[expert] if isinstance(weight, torch.Tensor) else dequantize(weight[expert]).to(dtype)


def packed(weight: Quantized) -> ExpertWeight:
    """Return codes and scales with packed codes if these are whole words of INT4 codes, else unchanged."""
    codes_XOI = weight.codes_XOI
    smallest, largest = (int(value) for value in codes_XOI.aminmax())
    is_int4 = smallest >= -CODE_OFFSET and largest < CODE_OFFSET and weight.group_size % _CODES_PER_WORD == 0
    return PackedInt4(words_XOW=pack(codes_XOI), scales_XOG=weight.scales_XOG.contiguous()) if is_int4 else weight


def _to(weight: ExpertWeight, device: torch.device) -> ExpertWeight:
    if isinstance(weight, Quantized) and device.type != "cpu":
        weight = packed(weight)
    if isinstance(weight, Quantized):
        return Quantized(codes_XOI=weight.codes_XOI.to(device), scales_XOG=weight.scales_XOG.to(device))
    if isinstance(weight, PackedInt4):
        return PackedInt4(words_XOW=weight.words_XOW.to(device), scales_XOG=weight.scales_XOG.to(device))
    return weight.to(device)


def build_layers(
    tensors: Tensors, *, config: ModelConfig, quant: QuantConfig, dtype: torch.dtype
) -> Iterator[LayerWeights]:
    """Yield the blocks in their order, each made when it is asked for."""
    for index in range(config.num_layers):
        yield _layer(tensors, index, config=config, quant=quant, dtype=dtype)


def build_module(
    tensors: Tensors, *, config: ModelConfig, quant: QuantConfig, dtype: torch.dtype
) -> ModuleWeights | None:
    """Return the first module of multi-token prediction; None if the model has none."""
    if not config.num_mtp_layers:
        return None
    prefix = f"model.layers.{config.num_layers}."
    return ModuleWeights(
        embed_norm_D=_plain(tensors, f"{prefix}enorm.weight").float(),
        hidden_norm_D=_plain(tensors, f"{prefix}hnorm.weight").float(),
        join_D2=_plain(tensors, f"{prefix}eh_proj.weight").to(dtype),
        layer=_layer(tensors, config.num_layers, config=config, quant=quant, dtype=dtype),
        norm_D=_plain(tensors, f"{prefix}shared_head.norm.weight").float(),
    )


def build_outer(tensors: Tensors, *, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the fields of `InferenceWeights` outside the blocks."""
    return {
        "embed_VD": _plain(tensors, "model.embed_tokens.weight").to(dtype),
        "norm_D": _plain(tensors, "model.norm.weight").float(),
        "head_VD": _plain(tensors, "lm_head.weight").to(dtype),
    }


def _plain(tensors: Tensors, name: str) -> torch.Tensor:
    tensor = tensors[name]
    assert isinstance(tensor, torch.Tensor), f"{name} is quantised, and only experts are"
    return tensor


def _layer(
    tensors: Tensors, index: int, *, config: ModelConfig, quant: QuantConfig, dtype: torch.dtype
) -> LayerWeights:
    prefix = f"model.layers.{index}."

    def matrix(name: str) -> torch.Tensor:
        return _plain(tensors, f"{prefix}{name}.weight").to(dtype)

    def vector(name: str) -> torch.Tensor:
        return _plain(tensors, f"{prefix}{name}.weight").float()

    nope, heads = config.qk_nope_head_dim, config.num_heads
    kv_b = matrix("self_attn.kv_b_proj").view(heads, nope + config.v_head_dim, config.kv_lora_rank)
    has_q_lora = config.q_lora_rank is not None
    is_dense = index < config.num_dense_layers
    if is_dense or config.num_shared_experts:
        feed_forward = "mlp" if is_dense else "mlp.shared_experts"
        gate, up, down = (matrix(f"{feed_forward}.{kind}_proj") for kind in ("gate", "up", "down"))
    else:
        gate = up = kv_b.new_zeros(0, config.hidden_size)
        down = kv_b.new_zeros(config.hidden_size, 0)
    layer = LayerWeights(
        input_norm_D=vector("input_layernorm"),
        post_norm_D=vector("post_attention_layernorm"),
        q_a=matrix("self_attn.q_a_proj") if has_q_lora else None,
        q_a_norm=vector("self_attn.q_a_layernorm") if has_q_lora else None,
        q_b=matrix("self_attn.q_b_proj" if has_q_lora else "self_attn.q_proj"),
        kv_a=matrix("self_attn.kv_a_proj_with_mqa"),
        kv_a_norm_C=vector("self_attn.kv_a_layernorm"),
        up_k_HNC=kv_b[:, :nope].contiguous(),
        up_v_HCV=kv_b[:, nope:].transpose(1, 2).contiguous(),
        o_proj=matrix("self_attn.o_proj"),
        dense_gate_up=torch.cat([gate, up]),
        dense_down=down,
    )
    if not is_dense:
        experts = f"{prefix}mlp.experts."
        layer.router_ED = _plain(tensors, f"{prefix}mlp.gate.weight").float()
        layer.router_bias_E = _plain(tensors, f"{prefix}mlp.gate.e_score_correction_bias").float()
        layer.experts = (
            expert_weight(tensors[f"{experts}gate_up_proj"], quant=quant, dtype=dtype),
            expert_weight(tensors[f"{experts}down_proj"], quant=quant, dtype=dtype),
        )
    return layer
