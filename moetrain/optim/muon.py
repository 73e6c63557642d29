"""Muon with RMS matching (arXiv 2502.16982), as pure functions of matrices: no ranks and no state.

`parallel.optimizer` decides which rank updates which matrix. B matrices of one shape, M rows, N columns.
"""

import math

import torch

from moetrain.kernels.build import Library
from moetrain.optim.config import NewtonSchulz, OptimizerName

_JORDAN = (3.4445, -4.7750, 2.0315)  # kellerjordan.github.io/posts/muon: steepest at 0, ends in a band around 1
_POLISH = (2.0, -1.5, 0.5)  # converges to 1 from within that band (arXiv 2606.19348)
COEFFICIENTS: dict[NewtonSchulz, tuple[tuple[float, float, float], ...]] = {
    NewtonSchulz.five: (_JORDAN,) * 5,
    NewtonSchulz.hybrid_8_2: (_JORDAN,) * 8 + (_POLISH,) * 2,
}
RMS_OF_ADAMW = 0.2  # Muon's update is scaled to the typical RMS of an AdamW update (arXiv 2502.16982, section 2.2)
_NORM_EPS = 1e-7
_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")
_ROUTER = "mlp.gate.weight"
_FUSED_GATE_UP = "experts.gate_up_proj"


def parameter_rule(name: str, shape: torch.Size, *, hidden_rule: OptimizerName) -> OptimizerName:
    """Return the optimizer of the parameter `name`: `hidden_rule` for hidden matrices, AdamW for all others.

    Hidden matrices are the two-dimensional weights inside the blocks and the matrices of each expert. Embeddings, head,
    norms and router use AdamW.
    """
    is_hidden = len(shape) >= 2 and not name.endswith(_EMBEDDINGS) and not name.endswith(_ROUTER)
    return hidden_rule if is_hidden else OptimizerName.adamw


def logical_shape(name: str, shape: torch.Size) -> tuple[int, int, int]:
    """Return (B, M, N): number and shape of the matrices in the parameter `name` that Muon orthogonalises separately.

    A stack of experts has one matrix per expert, or two if the gate and up projections are fused.
    """
    if len(shape) == 2:
        return 1, shape[0], shape[1]
    num_matrices, rows, columns = shape
    if name.endswith(_FUSED_GATE_UP):
        return 2 * num_matrices, rows // 2, columns
    return num_matrices, rows, columns


def logical_matrices(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` as a view [B, M, N]."""
    return tensor.view(logical_shape(name, tensor.shape))


def newton_schulz(x_BMN: torch.Tensor, *, schedule: NewtonSchulz, dtype: torch.dtype) -> torch.Tensor:
    """Return, in `dtype`, an approximation of the nearest semi-orthogonal matrix to each matrix of `x_BMN`.

    `five` moves singular values into a band of about 0.7 to 1.2, except those near zero, which stay small; `hybrid_8_2`
    moves them to within 1e-3 of 1. A zero matrix stays zero.
    """
    norm_B11 = torch.linalg.matrix_norm(x_BMN.float(), keepdim=True)
    y_BMN: torch.Tensor = (x_BMN.float() / (norm_B11 + _NORM_EPS)).to(dtype)
    is_tall = y_BMN.shape[-2] > y_BMN.shape[-1]
    if is_tall:
        y_BMN = y_BMN.transpose(-1, -2).contiguous()
    for a, b, c in COEFFICIENTS[schedule]:
        gram_BMM = torch.bmm(y_BMN, y_BMN.transpose(-1, -2))
        polynomial_BMM = torch.baddbmm(gram_BMM, gram_BMM, gram_BMM, beta=b, alpha=c)
        y_BMN = torch.baddbmm(y_BMN, polynomial_BMM, y_BMN, beta=a)
    return y_BMN.transpose(-1, -2) if is_tall else y_BMN


def nesterov(grad: torch.Tensor, momentum: torch.Tensor, *, decay: float) -> torch.Tensor:
    """Update `momentum` in place and return the look-ahead direction to orthogonalise. Elementwise."""
    momentum.mul_(decay).add_(grad)
    return grad.add(momentum, alpha=decay)


def dtype_of_products(dtype: torch.dtype, *, library: Library | None) -> torch.dtype:
    """Return the dtype of the Newton-Schulz products: float32 if the native kernels widen bfloat16, else `dtype`.

    Native kernels widen bfloat16 on CPUs with slow bfloat16 instructions or none. Newton-Schulz itself runs in torch.
    """
    return torch.float32 if library is not None and not library.units else dtype


def orthogonal_update(direction_BMN: torch.Tensor, *, schedule: NewtonSchulz, dtype: torch.dtype) -> torch.Tensor:
    """Return the float32 update 0.2 * sqrt(max(M, N)) * NewtonSchulz(direction), whose RMS matches that of AdamW."""
    scale = RMS_OF_ADAMW * math.sqrt(max(direction_BMN.shape[-2:]))
    return newton_schulz(direction_BMN, schedule=schedule, dtype=dtype).float().mul_(scale)


def apply_update(param: torch.Tensor, update: torch.Tensor, *, learning_rate: float, weight_decay: float) -> None:
    """Update in place: W -= lr * (update + wd * W). Elementwise."""
    param.mul_(1.0 - learning_rate * weight_decay).add_(update, alpha=-learning_rate)
