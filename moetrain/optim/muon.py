"""Muon with RMS matching (arXiv 2502.16982), as pure functions of matrices: no ranks, no ownership, no state.

Who holds which part of which matrix is the business of `parallel.optimizer`.
B matrices of one shape, M rows, N columns.
"""

import math

import torch

from moetrain.kernels.build import Library
from moetrain.optim.config import NewtonSchulz, OptimizerName

_JORDAN = (3.4445, -4.7750, 2.0315)  # kellerjordan.github.io/posts/muon: steepest at 0, lands in a band around 1
_POLISH = (2.0, -1.5, 0.5)  # converges to 1 from within that band (arXiv 2606.19348)
COEFFICIENTS: dict[NewtonSchulz, tuple[tuple[float, float, float], ...]] = {
    NewtonSchulz.five: (_JORDAN,) * 5,
    NewtonSchulz.hybrid_8_2: (_JORDAN,) * 8 + (_POLISH,) * 2,
}
RMS_OF_ADAMW = 0.2  # typical RMS of an AdamW update, which Muon's is scaled to (arXiv 2502.16982, section 2.2)
_NORM_EPS = 1e-7
_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")
_ROUTER = "mlp.gate.weight"
_FUSED_GATE_UP = "experts.gate_up_proj"


def parameter_rule(name: str, shape: torch.Size, *, hidden_rule: OptimizerName) -> OptimizerName:
    """Return the rule that updates the parameter `name`: `hidden_rule` for hidden matrices, AdamW for all else.

    Hidden matrices are the two-dimensional weights inside the blocks and every expert's own matrices. Embeddings, head,
    norms and router are on AdamW.
    """
    is_hidden = len(shape) >= 2 and not name.endswith(_EMBEDDINGS) and not name.endswith(_ROUTER)
    return hidden_rule if is_hidden else OptimizerName.adamw


def logical_shape(name: str, shape: torch.Size) -> tuple[int, int, int]:
    """Return (B, M, N): the matrices that Muon orthogonalises one by one in the parameter `name`.

    A stack of experts is one matrix an expert; its fused gate and up projections are two.
    """
    if len(shape) == 2:
        return 1, shape[0], shape[1]
    num_matrices, rows, columns = shape
    if name.endswith(_FUSED_GATE_UP):
        return 2 * num_matrices, rows // 2, columns
    return num_matrices, rows, columns


def logical_matrices(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` seen as [B, M, N], without a copy."""
    return tensor.view(logical_shape(name, tensor.shape))


def newton_schulz(x_BMN: torch.Tensor, *, schedule: NewtonSchulz, dtype: torch.dtype) -> torch.Tensor:
    """Return, in `dtype`, the nearest semi-orthogonal matrix of each of `x_BMN`, approximately.

    `five` leaves singular values in a band of about 0.7 to 1.2 and lets those near zero stay small; `hybrid_8_2` brings
    them to 1 within 1e-3. A matrix of zeros stays zero.
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
    """Move `momentum` in place and return the look-ahead direction that is orthogonalised. Element by element."""
    momentum.mul_(decay).add_(grad)
    return grad.add(momentum, alpha=decay)


def dtype_of_products(dtype: torch.dtype, *, library: Library | None) -> torch.dtype:
    """Return the dtype in which Newton-Schulz runs: float32 where the native kernels widen bfloat16.

    CPUs for which they do have a slow bfloat16 instruction or none. Newton-Schulz runs in torch, without the kernels.
    """
    return torch.float32 if library is not None and not library.paired else dtype


def orthogonal_update(direction_BMN: torch.Tensor, *, schedule: NewtonSchulz, dtype: torch.dtype) -> torch.Tensor:
    """Return the float32 update 0.2 * sqrt(max(M, N)) * NewtonSchulz(direction): its RMS is that of an AdamW update."""
    scale = RMS_OF_ADAMW * math.sqrt(max(direction_BMN.shape[-2:]))
    return newton_schulz(direction_BMN, schedule=schedule, dtype=dtype).float().mul_(scale)


def apply_update(param: torch.Tensor, update: torch.Tensor, *, learning_rate: float, weight_decay: float) -> None:
    """Step in place: W -= lr * (update + wd * W). Element by element."""
    param.mul_(1.0 - learning_rate * weight_decay).add_(update, alpha=-learning_rate)
