"""Weights as the native kernels read them: routed experts as INT4 codes and scales if they are quantised to them, all
else in bfloat16.

H heads, D hidden, C kv_lora, E experts, F expert width, G = 2F (gate rows first), V value width, N rows of a matrix, K
its inputs.
"""

from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from moetrain.inference.mode import Mode
from moetrain.inference.weights import ExpertWeight, LayerWeights
from moetrain.kernels.build import Library, Units
from moetrain.kernels.memory import Memory
from moetrain.model.config import ModelConfig
from moetrain.quant.grids import Quantized, dequantize

GROUP = 32
"""Inputs that the kernels read together; the group size of the quantised experts that they multiply."""


def padded(x_NK: torch.Tensor) -> torch.Tensor:
    """Return rows padded with zeros to a multiple of GROUP."""
    missing = -x_NK.shape[-1] % GROUP
    return F.pad(x_NK, (0, missing)) if missing else x_NK


@dataclass(frozen=True)
class Packer:
    """Packs the weights of one model. They lie in memory in the order of the calls."""

    library: Library
    units: Units
    memory: Memory = field(default_factory=Memory)

    def dense(self, weight_XNK: torch.Tensor) -> torch.Tensor:
        """Return one or several matrices [..., N, K], packed one after the other."""
        weight_XNK = padded(weight_XNK.to(torch.bfloat16)).contiguous()
        *leading, num_rows, num_inputs = weight_XNK.shape
        count = torch.Size(leading).numel()
        size = count * self.library.packed_bytes(0, num_rows, num_inputs)
        packed = self.memory.zeros(size, dtype=torch.uint8)
        self.library("pack_dense", weight_XNK, packed, count, num_rows, num_inputs)
        return packed

    def layer(self, layer: LayerWeights, *, config: ModelConfig, mode: Mode) -> list[torch.Tensor | int | None]:
        """Return a block as `NativeModel` holds it: the fields of the kernels' DecodeLayer in their order."""
        width = layer.dense_down.shape[1]
        gate, up = (layer.dense_gate_up[:width], layer.dense_gate_up[width:]) if width else (None, None)
        is_fast = mode is Mode.fast
        kv_b_HEC = torch.cat([layer.up_k_HNC, layer.up_v_HCV.transpose(1, 2)], 1)
        matrices = [
            layer.q_a,
            layer.q_b,
            layer.kv_a,
            None if is_fast else kv_b_HEC.flatten(0, 1),
            layer.up_k_HNC.transpose(1, 2) if is_fast else None,
            layer.up_v_HCV.transpose(1, 2) if is_fast else None,
            layer.o_proj,
            gate,
            up,
            None if gate is None else layer.dense_down,
        ]
        experts: list[torch.Tensor | None] = [None, None]
        is_int4 = False
        if layer.experts is not None:
            gate_up, down = layer.experts
            is_int4 = _is_int4(gate_up) and _is_int4(down)
            experts = [
                self._experts(gate_up, num_matrices=2, is_int4=is_int4),
                self._experts(down, num_matrices=1, is_int4=is_int4),
            ]
        return [
            layer.input_norm_D,
            layer.post_norm_D,
            layer.q_a_norm,
            layer.kv_a_norm_C,
            layer.router_ED,
            layer.router_bias_E,
            *(None if matrix is None else self.dense(matrix) for matrix in matrices),
            *experts,
            width,
            config.moe_intermediate_size,
            int(is_int4),
        ]

    def _experts(self, weight: ExpertWeight, *, num_matrices: int, is_int4: bool) -> torch.Tensor:
        """Return routed experts [E, N, K], packed. num_matrices: number of matrices that an expert's rows hold."""
        if isinstance(weight, Quantized):
            if is_int4:
                return self._int4(weight, num_matrices)
            weight = dequantize(weight)
        assert isinstance(weight, torch.Tensor), "codes of words are unpacked before"
        num_experts, num_rows, num_inputs = weight.shape
        return self.dense(weight.view(num_experts, num_matrices, num_rows // num_matrices, num_inputs))

    def _int4(self, weight: Quantized, num_matrices: int) -> torch.Tensor:
        num_experts, num_rows, num_inputs = weight.codes_XOI.shape
        count, num_columns = num_experts * num_matrices, num_rows // num_matrices
        size = count * self.library.packed_bytes(1, num_columns, num_inputs)
        packed = self.memory.zeros(size, dtype=torch.uint8)
        codes, scales = weight.codes_XOI.contiguous(), weight.scales_XOG.contiguous()
        self.library("pack_int4", self.units, codes, scales, packed, count, num_columns, num_inputs)
        return packed


def _is_int4(weight: ExpertWeight) -> bool:
    """Return whether the kernels multiply a matrix from its codes.

    They do for 16 whole codes, in groups of 32, with scales far from the limits of float32.
    """
    if not isinstance(weight, Quantized) or weight.group_size != GROUP or bool((weight.codes_XOI.abs() > 8).any()):
        return False
    scales = weight.scales_XOG.float().abs()
    return bool(((scales == 0) | (scales > 2.0**-100) & (scales < 2.0**100)).all())
