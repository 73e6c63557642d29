"""The routed experts of generation in torch: a loop over experts, and the fast paths of GPUs, which the host starts
without reading which experts were chosen.

N tokens, K chosen experts, S = N * K rows sorted by expert, D hidden, E experts, F expert width, G = 2F (gate rows
first).
"""

import functools
import importlib.util
import logging

import torch
from torch.nn import functional as F

from moetrain.inference.weights import ExpertWeight, PackedInt4, multiplied
from moetrain.ops.experts import expert_grouped

_log = logging.getLogger(__name__)
_CAPABILITY = (8, 0)
"""Compute capability from which GPUs multiply bfloat16."""


def expert_sums(
    x_ND: torch.Tensor,
    expert_ids_NK: torch.Tensor,
    *,
    weights_NK: torch.Tensor,
    gate_up: ExpertWeight,
    down: ExpertWeight,
) -> torch.Tensor:
    """Return the weighted sum of the chosen experts' outputs. gate_up: [E, G, D]. down: [E, D, F]."""
    if x_ND.dtype == torch.bfloat16 and _multiplies_bfloat16(x_ND.device):
        if isinstance(gate_up, PackedInt4) and isinstance(down, PackedInt4) and has_triton():
            return sums_from_codes(x_ND, expert_ids_NK, weights_NK=weights_NK, gate_up=gate_up, down=down)
        if isinstance(gate_up, torch.Tensor) and isinstance(down, torch.Tensor):
            return sums_grouped(x_ND, expert_ids_NK, weights_NK=weights_NK, gate_up_EGD=gate_up, down_EDF=down)
    return sums_by_loop(x_ND, expert_ids_NK, weights_NK=weights_NK, gate_up=gate_up, down=down)


def sums_by_loop(
    x_ND: torch.Tensor,
    expert_ids_NK: torch.Tensor,
    *,
    weights_NK: torch.Tensor,
    gate_up: ExpertWeight,
    down: ExpertWeight,
) -> torch.Tensor:
    """Return the sums, computed one expert at a time: the reference, on any device and in any dtype.

    One expert's weights exist in the dtype of `x` at a time.
    """
    num_chosen = expert_ids_NK.shape[1]
    ids_S, order_S = expert_ids_NK.flatten().sort(stable=True)
    experts, counts = torch.unique_consecutive(ids_S, return_counts=True)
    y_SD = torch.empty(len(ids_S), x_ND.shape[1], dtype=torch.float32, device=x_ND.device)
    end = 0
    for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
        places = order_S[end : end + count]
        end += count
        y_SD[places] = swiglu(
            x_ND[places // num_chosen],
            multiplied(gate_up, expert, dtype=x_ND.dtype),
            down=multiplied(down, expert, dtype=x_ND.dtype),
        ).float()
    return _weighted(y_SD, weights_NK, dtype=x_ND.dtype)


def sums_grouped(
    x_ND: torch.Tensor,
    expert_ids_NK: torch.Tensor,
    *,
    weights_NK: torch.Tensor,
    gate_up_EGD: torch.Tensor,
    down_EDF: torch.Tensor,
) -> torch.Tensor:
    """Return the sums by the grouped products of training, for experts in bfloat16."""
    num_chosen, num_experts = expert_ids_NK.shape[1], len(down_EDF)
    ids_S, order_S = expert_ids_NK.flatten().sort(stable=True)
    counts_E = torch.searchsorted(ids_S, torch.arange(num_experts + 1, device=x_ND.device)).diff()
    sorted_SD = expert_grouped(x_ND[order_S // num_chosen], counts_E, gate_up_LGD=gate_up_EGD, down_LDF=down_EDF)
    y_SD = torch.empty(sorted_SD.shape, dtype=torch.float32, device=x_ND.device)
    y_SD[order_S] = sorted_SD.float()
    return _weighted(y_SD, weights_NK, dtype=x_ND.dtype)


def sums_from_codes(
    x_ND: torch.Tensor,
    expert_ids_NK: torch.Tensor,
    *,
    weights_NK: torch.Tensor,
    gate_up: PackedInt4,
    down: PackedInt4,
) -> torch.Tensor:
    """Return the sums by the Triton kernels, straight from INT4 codes."""
    from moetrain.kernels.gpu import int4  # Triton is optional

    return int4.expert_sums(
        x_ND,
        expert_ids_NK,
        weights_NK=weights_NK,
        gate_up=int4.Codes(words=gate_up.words_XOW, scales=gate_up.scales_XOG),
        down=int4.Codes(words=down.words_XOW, scales=down.scales_XOG),
    )


def swiglu(x: torch.Tensor, gate_up: torch.Tensor, *, down: torch.Tensor) -> torch.Tensor:
    """Return down(silu(gate x) * up x)."""
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, down)


@functools.cache
def has_triton() -> bool:
    """Return whether Triton is installed."""
    is_found = importlib.util.find_spec("triton") is not None
    if not is_found:
        _log.warning(
            "Triton is not installed: generation unpacks the INT4 experts one at a time, which is slow; "
            "install it with: pip install 'moetrain[gpu]'"
        )
    return is_found


@functools.cache
def _multiplies_bfloat16(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _CAPABILITY


def _weighted(y_SD: torch.Tensor, weights_NK: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """Return the weighted sum of the outputs of each token's experts."""
    return (y_SD.view(*weights_NK.shape, -1) * weights_NK[..., None]).sum(1).to(dtype)
