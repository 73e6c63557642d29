"""The tensors of a GGUF file of the architecture `deepseek2`, from a model's tensors and back. Nothing is read early.

Rotary widths keep their order: llama.cpp rotates adjacent pairs, as this package does.

Shape letters: E experts, O rows, I inputs, G groups of 32 inputs, H heads, N query-key width without position, V value
width, C rank of the compressed keys and values.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from moetrain.errors import CheckpointError
from moetrain.export.config import GgufDtype
from moetrain.export.experts import ExpertCodes
from moetrain.export.tensors import FolderTensors
from moetrain.model.attention import LATENT_NORM_EPS
from moetrain.model.config import ModelConfig
from moetrain.parallel.protocol import StateReader
from moetrain.quant.grids import Quantized

BLOCK = 32
"""Weights of a Q4_0 block: a float16 scale, then 16 bytes. Byte j holds code j (low bits) and code j + 16, plus 8."""
BLOCK_BYTES = 18
_CODE_OFFSET = 8
_BYTES = {"F32": 4, "BF16": 2}

Array = NDArray[np.generic]


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One tensor of the file: its name and shape there, its type, and the function that computes its bytes."""

    name: str
    shape: tuple[int, ...]
    type: str
    """F32, BF16 or Q4_0."""
    data: Callable[[], Array]

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        size = math.prod(self.shape)
        return size // BLOCK * BLOCK_BYTES if self.type == "Q4_0" else size * _BYTES[self.type]


_DIRECT = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_BY_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
_KV_B = "self_attn.kv_b_proj.weight"
_GATE_UP, _DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
_LATENTS = ("self_attn.q_a_proj.weight", "self_attn.kv_a_proj_with_mqa.weight")


def gguf_tensors(
    reader: StateReader,
    *,
    model: ModelConfig,
    tensors: FolderTensors,
    experts: ExpertCodes | None,
    dtype: GgufDtype,
) -> Iterator[GgufTensor]:
    """Yield every tensor of the file; each reads its values when its data is asked for. experts: None: plain."""

    def whole(name: str) -> Tensor:
        shape = tensors.shapes[name]
        return reader.read(name, first=0, last=shape.numel()).view(shape)

    def part(name: str, to: str, *, shape: tuple[int, ...], change: Callable[[Tensor], Tensor]) -> GgufTensor:
        is_float = name in tensors.float32 or dtype is GgufDtype.float32 or _is_scaled(name, model)
        kind = "F32" if is_float else "BF16"
        rounds = not is_float or (dtype is GgufDtype.bf16 and name not in tensors.float32)

        def data() -> Array:
            value = whole(name)
            return _as_array(change(value.bfloat16() if rounds else value.float()), kind=kind)

        return GgufTensor(name=to, shape=shape, type=kind, data=data)

    for name, size in tensors.shapes.items():
        to, local, at = _placed(name)
        if name in tensors.experts:
            yield from _experts(reader, name, shape=size, at=at, experts=experts, dtype=dtype)
        elif local == _KV_B:
            heads, rank = model.num_heads, model.kv_lora_rank
            keys, values = (heads, rank, model.qk_nope_head_dim), (heads, model.v_head_dim, rank)
            yield part(name, f"{at}attn_k_b.weight", shape=keys, change=lambda kv: _split_kv(kv, model)[0])
            yield part(name, f"{at}attn_v_b.weight", shape=values, change=lambda kv: _split_kv(kv, model)[1])
        elif _is_scaled(name, model):
            yield part(name, to, shape=tuple(size), change=partial(_scaled, local=local, model=model))
        else:
            yield part(name, to, shape=tuple(size), change=lambda weight: weight)


def tensors_of_gguf(
    arrays: Mapping[str, Tensor | Quantized], *, model: ModelConfig, tensors: FolderTensors
) -> tuple[dict[str, Tensor], dict[str, Quantized]]:
    """Return tensors and quantised experts by name in memory, from those of a file: the inverse of `gguf_tensors`.

    Raises CheckpointError when a tensor is missing or unknown.
    """
    left = dict(arrays)

    def take(name: str) -> Tensor | Quantized:
        if name not in left:
            raise CheckpointError(f"{name} is missing from the file: export again")
        return left.pop(name)

    def plain(name: str) -> Tensor:
        value = take(name)
        if isinstance(value, Quantized):
            raise CheckpointError(f"{name} is stored as Q4_0, which only routed experts may be: export again")
        return value

    dense: dict[str, Tensor] = {}
    experts: dict[str, Quantized] = {}
    for name in tensors.shapes:
        to, local, at = _placed(name)
        if name in tensors.experts:
            kinds = ("gate", "up") if local == _GATE_UP else ("down",)
            parts = [take(f"{at}ffn_{kind}_exps.weight") for kind in kinds]
            quantized = [part for part in parts if isinstance(part, Quantized)]
            if len(quantized) == len(parts):
                experts[name] = Quantized(
                    codes_XOI=torch.cat([part.codes_XOI for part in quantized], 1),
                    scales_XOG=torch.cat([part.scales_XOG for part in quantized], 1),
                )
            else:
                dense[name] = torch.cat([part for part in parts if isinstance(part, Tensor)], 1)
        elif local == _KV_B:
            k_HCN, v_HVC = plain(f"{at}attn_k_b.weight"), plain(f"{at}attn_v_b.weight")
            dense[name] = torch.cat([k_HCN.transpose(1, 2), v_HVC], 1).flatten(0, 1)
        elif _is_scaled(name, model):
            dense[name] = plain(to) / _row_factors(local, model)
        else:
            dense[name] = plain(to)
    if left:
        raise CheckpointError(f"{min(left)} is not a tensor of this model: export again")
    return dense, experts


def blocks_of(quantized: Quantized, *, name: str) -> NDArray[np.uint8]:
    """Return codes and scales [..., out, in] as Q4_0 blocks, uint8 [..., out, 18 * in / 32].

    Raises CheckpointError when float16 cannot hold a scale.
    """
    scales_XOG = quantized.scales_XOG.to(torch.float16)
    if not torch.equal(scales_XOG.float(), quantized.scales_XOG.float()):
        raise CheckpointError(
            f"{name}: a scale is not a float16 number, which Q4_0 stores: export with export.format=quantized"
        )
    nibbles_XOGS = rearrange((quantized.codes_XOI + _CODE_OFFSET).to(torch.uint8), "... (g s) -> ... g s", s=BLOCK)
    bytes_XOGB = nibbles_XOGS[..., : BLOCK // 2] | nibbles_XOGS[..., BLOCK // 2 :] << 4
    blocks = torch.cat([scales_XOG.unsqueeze(-1).contiguous().view(torch.uint8), bytes_XOGB], -1)
    return blocks.flatten(-2).numpy()


def quantized_of(blocks_XOB: Tensor) -> Quantized:
    """Return the codes and scales of Q4_0 blocks: the inverse of `blocks_of`."""
    blocks_XOGB = rearrange(blocks_XOB, "... (g b) -> ... g b", b=BLOCK_BYTES)
    scales_XOG = blocks_XOGB[..., :2].contiguous().view(torch.float16).squeeze(-1)
    packed = blocks_XOGB[..., 2:]
    codes_XOI = torch.cat([packed & 0xF, packed >> 4], -1).to(torch.int8).flatten(-2) - _CODE_OFFSET
    return Quantized(codes_XOI=codes_XOI, scales_XOG=scales_XOG.to(torch.bfloat16))


def _experts(
    reader: StateReader,
    name: str,
    *,
    shape: torch.Size,
    at: str,
    experts: ExpertCodes | None,
    dtype: GgufDtype,
) -> Iterator[GgufTensor]:
    """Yield the stacked experts of one or two projections; one expert beside the target is in memory at a time."""
    num_experts, rows, inputs = shape
    kinds = ("gate", "up") if name.endswith("gate_up_proj") else ("down",)
    num_rows = rows // len(kinds)
    if experts is not None and not experts.quantizes(name):
        experts = None
    kind_of_data = "Q4_0" if experts is not None else ("F32" if dtype is GgufDtype.float32 else "BF16")

    def one(expert: int, projection: int) -> Array:
        top = projection * num_rows
        if experts is not None:
            quantized = experts.of(name, expert, top=top, bottom=top + num_rows)
            return blocks_of(quantized[0], name=f"{name}[{expert}]")
        first = (expert * rows + top) * inputs
        weight_OI = reader.read(name, first=first, last=first + num_rows * inputs).view(num_rows, inputs)
        return _as_array(weight_OI, kind=kind_of_data)

    def data(projection: int) -> Array:
        whole: Array | None = None
        for expert in range(num_experts):
            matrix = one(expert, projection)
            if whole is None:
                whole = np.empty((num_experts, *matrix.shape), matrix.dtype)
            whole[expert] = matrix
        assert whole is not None, "a layer has experts"
        return whole

    for projection, kind in enumerate(kinds):
        yield GgufTensor(
            name=f"{at}ffn_{kind}_exps.weight",
            shape=(num_experts, num_rows, inputs),
            type=kind_of_data,
            data=partial(data, projection),
        )


def _placed(name: str) -> tuple[str, str, str]:
    """Return the name in the file, the name within its layer, and the prefix of the layer in the file."""
    if name in _DIRECT:
        return _DIRECT[name], name, ""
    layer, local = name.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{_BY_LAYER.get(local, local)}", local, f"blk.{layer}."


def _split_kv(kv: Tensor, model: ModelConfig) -> tuple[Tensor, Tensor]:
    """Return the keys' part [H, C, N], transposed, and the values' part [H, V, C] of kv_b_proj."""
    by_head = kv.view(model.num_heads, -1, kv.shape[-1])
    k_HNC, v_HVC = by_head[:, : model.qk_nope_head_dim], by_head[:, model.qk_nope_head_dim :]
    return k_HNC.transpose(1, 2), v_HVC


def _is_scaled(name: str, model: ModelConfig) -> bool:
    """Return whether a projection to a latent is stored scaled, in float32.

    llama.cpp has one epsilon for all norms, ours has its own for the norms of the latents. A norm with epsilon e of x
    is the norm with epsilon E of x * sqrt(E / e), so scaling the rows that make x gives the same output.
    """
    return model.rms_norm_eps != LATENT_NORM_EPS and name.endswith(_LATENTS)


def _scaled(weight: Tensor, *, local: str, model: ModelConfig) -> Tensor:
    return weight.float() * _row_factors(local, model)


def _row_factors(local: str, model: ModelConfig) -> Tensor:
    """Return the factor of each row [O, 1]; the rows of the rotary key, which has no norm, keep their values."""
    factor = math.sqrt(model.rms_norm_eps / LATENT_NORM_EPS)
    if local == _LATENTS[0]:
        return torch.tensor([[factor]])
    return torch.tensor([factor] * model.kv_lora_rank + [1.0] * model.qk_rope_head_dim)[:, None]


def _as_array(tensor: Tensor, *, kind: str) -> Array:
    if kind == "BF16":
        return tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint16)
    array: Array = tensor.float().contiguous().numpy()
    return array
