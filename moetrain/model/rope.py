"""Rotary positions with YaRN (arXiv 2309.00071), in DeepSeek's interleaved layout of pairs.

B rows, T tokens, H heads, S positions, R rotary width, P = R / 2 pairs.
"""

import math
from dataclasses import dataclass

import torch

from moetrain.model.config import ModelConfig

_SINGULAR_RAMP = 1e-3  # ramp width when its start equals its end, as in transformers


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Cosine and sine of each pair's angle at each token, float32, broadcastable to [B, T, H, P]."""

    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class RopeTable:
    """Cosine and sine of each pair's angle at every position, float32."""

    cos_SP: torch.Tensor
    sin_SP: torch.Tensor

    def to(self, device: torch.device) -> "RopeTable":
        """Return the table on `device`."""
        return RopeTable(cos_SP=self.cos_SP.to(device), sin_SP=self.sin_SP.to(device))

    def at(self, positions_BT: torch.Tensor) -> Rotation:
        """Return the rotation at these token positions."""
        return Rotation(cos=self.cos_SP[positions_BT][..., None, :], sin=self.sin_SP[positions_BT][..., None, :])


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def inverse_frequencies(config: ModelConfig) -> torch.Tensor:
    """Return the radians per position of each pair [P], float32; YaRN divides the low frequencies by its factor."""
    width, base, yarn = config.qk_rope_head_dim, config.rope_theta, config.yarn
    wavelengths_P = base ** (torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width)
    if yarn.factor <= 1:
        return 1.0 / wavelengths_P

    def correction(rotations: float) -> float:
        """Return the dimension that makes `rotations` full turns over the original context."""
        return width * math.log(yarn.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(correction(yarn.beta_fast)), 0)
    high = min(math.ceil(correction(yarn.beta_slow)), width - 1)
    ramp_width = high - low if high != low else _SINGULAR_RAMP
    ramp_P = torch.clamp((torch.arange(width // 2, dtype=torch.float32, device="cpu") - low) / ramp_width, 0, 1)
    return 1.0 / (yarn.factor * wavelengths_P) * ramp_P + 1.0 / wavelengths_P * (1 - ramp_P)


def build_rope(config: ModelConfig, num_positions: int) -> RopeTable:
    """Return the table for positions 0 to num_positions - 1, on the CPU."""
    angles_SP = torch.arange(num_positions, dtype=torch.float32, device="cpu")[:, None] * inverse_frequencies(config)
    yarn = config.yarn
    scale = _yarn_mscale(yarn.factor, yarn.mscale) / _yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    return RopeTable(cos_SP=angles_SP.cos() * scale, sin_SP=angles_SP.sin() * scale)


def rotate(x_BTHR: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Return `x_BTHR` with its pairs (x0, x1), (x2, x3)... rotated; computed in float32, returned in the dtype of x.

    The result contains the first members of all pairs, then the second members, like transformers' `rope_interleave`.
    Queries and keys get the same permutation, so their products are unchanged.
    """
    first, second = x_BTHR.float().view(*x_BTHR.shape[:-1], -1, 2).unbind(-1)
    cos, sin = rotation.cos, rotation.sin
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x_BTHR.dtype)


def apply_rope(x_BTHR: torch.Tensor, rope: RopeTable, *, positions_BT: torch.Tensor) -> torch.Tensor:
    """Return `x_BTHR` rotated to its positions."""
    return rotate(x_BTHR, rope.at(positions_BT))
