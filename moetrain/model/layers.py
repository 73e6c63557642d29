"""The basic layers: linear, RMS norm, SwiGLU feed-forward. Parameters are fp32; products run in the dtype of x.

x has any leading axes.
"""

import torch
from torch import nn

from moetrain.model.kernel_module import KernelModule
from moetrain.model.recompute import Recomputable, run_part
from moetrain.ops.dense import linear, rms_norm, swiglu


class Linear(KernelModule):
    """A linear layer without bias; the fp32 weight [out, in] is cast to the dtype of the input."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_out, num_in, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T over the last axis."""
        return linear(x, self.weight, library=self.library)


class RMSNorm(KernelModule):
    """Root-mean-square norm over the last axis. It runs in float32 because squares lose too much precision in bf16."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=torch.float32))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x normalised and multiplied by the weight, in the dtype of x."""
        return rms_norm(x, self.weight, eps=self.eps, library=self.library)


class FeedForward(Recomputable, KernelModule):
    """SwiGLU feed-forward layer (arXiv 2002.05202): a dense layer, or all shared experts as one layer."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, width)
        self.up_proj = Linear(hidden_size, width)
        self.down_proj = Linear(width, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return down(silu(gate(x)) * up(x))."""
        return run_part(self._compute, x, parameters=self.parameters(), recompute=self.recompute)

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        hidden = swiglu(self.gate_proj(x), self.up_proj(x), library=self.library)
        y: torch.Tensor = self.down_proj(hidden)
        return y
