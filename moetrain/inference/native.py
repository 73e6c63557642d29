"""The forward pass of generation by the native kernels: all layers of a step in one call.

Every matrix is packed once, as the kernels read it: routed experts as INT4 codes and scales if the model is quantised
to them, all else in bfloat16. A row's result depends on its own tokens only, bit for bit, and not on the other rows or
the number of threads. In the mode `deterministic` it is also the result of training: the cache holds the keys and
values of each head instead of latents, and attention adds in the order of training.

H heads, D hidden, C kv_lora, E experts, F expert width, G = 2F (gate rows first), V value width, N rows of a matrix.
"""

from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from moetrain.inference.forward import longer
from moetrain.inference.mode import Mode
from moetrain.inference.rows import PAGE, Rows
from moetrain.inference.weights import ExpertWeight, LayerWeights
from moetrain.kernels.build import Library, Units
from moetrain.model.attention import LATENT_NORM_EPS
from moetrain.model.config import ModelConfig
from moetrain.model.gate_scale import routed_scaling_factor
from moetrain.model.rope import build_rope
from moetrain.model.router import KERNEL_NUMBERS
from moetrain.quant.grids import Quantized, dequantize

GROUP = 32
"""Inputs that the kernels read together; the group size of the quantised experts that they multiply."""


@dataclass(kw_only=True)
class NativeModel:
    """Implements `inference.protocol.Model` on a CPU in bfloat16."""

    config: ModelConfig
    library: Library
    embed_VD: torch.Tensor
    norm_D: torch.Tensor
    head: torch.Tensor
    layers: list[list[torch.Tensor | int | None]]
    units: Units
    """Units of all products; those for which the matrices are packed."""
    mode: Mode = Mode.fast
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        """Lay the tables out that every call passes."""
        config, pointers = self.config, []
        for layer in self.layers:
            pointers += [item.data_ptr() if isinstance(item, torch.Tensor) else item or 0 for item in layer]
        self._table = torch.tensor(pointers, dtype=torch.int64)
        shape = [config.num_layers, config.hidden_size, config.num_heads, config.qk_nope_head_dim]
        shape += [config.qk_rope_head_dim, config.v_head_dim, config.kv_lora_rank, config.q_lora_rank or 0]
        shape += [config.num_experts, config.num_experts_per_token, config.num_groups, config.num_groups_per_token]
        shape += [KERNEL_NUMBERS[config.score_function], int(config.normalize_weights)]
        shape += [int(self.mode is Mode.deterministic)]
        self._shape = torch.tensor(shape, dtype=torch.int64)
        factors = [config.rms_norm_eps, LATENT_NORM_EPS, config.softmax_scale, routed_scaling_factor(config)]
        self._factors = torch.tensor(factors, dtype=torch.float32)
        self._rope = build_rope(config, 1)

    def new_cache(self, num_pages: int) -> torch.Tensor:
        """Return an empty cache: of latents and rotary keys, or of the keys and values of each head."""
        config = self.config
        if self.mode is Mode.deterministic:
            widths = sum(-(-width // GROUP) * GROUP for width in (config.qk_head_dim, config.v_head_dim))
            shape = (config.num_layers, num_pages, config.num_heads, PAGE * widths)
        else:
            shape = (config.num_layers, num_pages, PAGE, config.kv_lora_rank + config.qk_rope_head_dim)
        return torch.zeros(shape, dtype=torch.bfloat16)

    @property
    def logprob_library(self) -> Library | None:
        """The kernels that compute logprobs as training does, in the mode `deterministic`."""
        return self.library if self.mode is Mode.deterministic else None

    def forward(self, rows: Rows, cache_LPSC: torch.Tensor) -> torch.Tensor:
        """Return hidden states [N, D] after the last norm."""
        self._rope = longer(self._rope, self.config, num_positions=rows.tables_SW.shape[1] * PAGE)
        x_ND = F.embedding(rows.tokens_N, self.embed_VD)
        out_ND = torch.empty_like(x_ND)
        self.library(
            "decode_rows",
            self.units,
            self._shape,
            self._factors,
            self._table,
            self.norm_D,
            rows.sequences_N.int(),
            rows.positions_N.int(),
            rows.tables_SW.int(),
            self._rope.cos_SP,
            self._rope.sin_SP,
            cache_LPSC,
            x_ND,
            out_ND,
            len(x_ND),
            rows.tables_SW.shape[1],
            cache_LPSC.shape[1],
        )
        return out_ND

    def logits(self, hidden_MD: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [M, V]."""
        padded = _padded(hidden_MD.contiguous())
        out = torch.empty(len(hidden_MD), self.config.vocab_size, dtype=torch.bfloat16)
        self.library("packed_linear", self.units, padded, self.head, out, *out.shape, padded.shape[1])
        return out.float()


def _padded(x_NK: torch.Tensor) -> torch.Tensor:
    """Return rows padded with zeros to a multiple of GROUP."""
    missing = -x_NK.shape[-1] % GROUP
    return F.pad(x_NK, (0, missing)) if missing else x_NK


def _dense(weight_XNK: torch.Tensor, library: Library) -> torch.Tensor:
    """Return one or several matrices [..., N, K], packed one after the other."""
    weight_XNK = _padded(weight_XNK.to(torch.bfloat16)).contiguous()
    *leading, num_rows, num_inputs = weight_XNK.shape
    count = torch.Size(leading).numel()
    packed = torch.empty(count * library.packed_bytes(0, num_rows, num_inputs), dtype=torch.uint8)
    library("pack_dense", weight_XNK, packed, count, num_rows, num_inputs)
    return packed


def _int4(weight: Quantized, library: Library, *, units: Units, num_matrices: int) -> torch.Tensor:
    """Return quantised experts [E, N, K], packed. num_matrices: number of matrices that an expert's rows hold."""
    num_experts, num_rows, num_inputs = weight.codes_XOI.shape
    count, size = num_experts * num_matrices, num_rows // num_matrices
    packed = torch.empty(count * library.packed_bytes(1, size, num_inputs), dtype=torch.uint8)
    codes, scales = weight.codes_XOI.contiguous(), weight.scales_XOG.contiguous()
    library("pack_int4", units, codes, scales, packed, count, size, num_inputs)
    return packed


def packed_head(weight_VD: torch.Tensor, *, library: Library) -> torch.Tensor:
    """Return the output projection as `NativeModel` holds it."""
    return _dense(weight_VD, library)


def packed_layer(
    layer: LayerWeights, config: ModelConfig, *, library: Library, units: Units, mode: Mode
) -> list[torch.Tensor | int | None]:
    """Return a block in bfloat16 as `NativeModel` holds it: the fields of the kernels' DecodeLayer in their order."""
    width = layer.dense_down.shape[1]
    gate, up = (layer.dense_gate_up[:width], layer.dense_gate_up[width:]) if width else (None, None)
    experts: list[torch.Tensor | int | None] = [None, None]
    is_int4 = 0
    if layer.experts is not None:
        gate_up, down = layer.experts
        is_int4 = int(_is_int4(gate_up) and _is_int4(down))
        experts = [
            _experts(gate_up, library, units=units, num_matrices=2, is_int4=bool(is_int4)),
            _experts(down, library, units=units, num_matrices=1, is_int4=bool(is_int4)),
        ]
    is_fast = mode is Mode.fast
    kv_b_HEC = torch.cat([layer.up_k_HNC, layer.up_v_HCV.transpose(1, 2)], 1)
    return [
        layer.input_norm_D,
        layer.post_norm_D,
        layer.q_a_norm,
        layer.kv_a_norm_C,
        layer.router_ED,
        layer.router_bias_E,
        None if layer.q_a is None else _dense(layer.q_a, library),
        _dense(layer.q_b, library),
        _dense(layer.kv_a, library),
        None if is_fast else _dense(kv_b_HEC.flatten(0, 1), library),
        _dense(layer.up_k_HNC.transpose(1, 2), library) if is_fast else None,
        _dense(layer.up_v_HCV.transpose(1, 2), library) if is_fast else None,
        _dense(layer.o_proj, library),
        None if gate is None else _dense(gate, library),
        None if up is None else _dense(up, library),
        None if gate is None else _dense(layer.dense_down, library),
        *experts,
        width,
        config.moe_intermediate_size,
        is_int4,
    ]


def _is_int4(weight: ExpertWeight) -> bool:
    """Return whether the kernels multiply a matrix from its codes.

    They do for 16 whole codes, in groups of 32, with scales far from the limits of float32.
    """
    if not isinstance(weight, Quantized) or weight.group_size != GROUP or bool((weight.codes_XOI.abs() > 8).any()):
        return False
    scales = weight.scales_XOG.float().abs()
    return bool(((scales == 0) | (scales > 2.0**-100) & (scales < 2.0**100)).all())


def _experts(weight: ExpertWeight, library: Library, *, units: Units, num_matrices: int, is_int4: bool) -> torch.Tensor:
    if isinstance(weight, Quantized):
        if is_int4:
            return _int4(weight, library, units=units, num_matrices=num_matrices)
        weight = dequantize(weight)
    assert isinstance(weight, torch.Tensor), "codes are packed by `pack_int4` only"
    num_experts, num_rows, num_inputs = weight.shape
    return _dense(weight.view(num_experts, num_matrices, num_rows // num_matrices, num_inputs), library)
