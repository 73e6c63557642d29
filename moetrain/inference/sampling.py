"""Sampling that depends on (stream, position) only, and not on the batch, the slot or the order of arrival.

B sequences, V vocabulary.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from moetrain.ops.logprobs import exponentials

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_UNIT = 2.0**-53


def uniforms(streams_B: NDArray[np.uint64], positions_B: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return one number from [0, 1) for each (stream, position) by SplitMix64 (Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        z_B = streams_B + _GOLDEN * (positions_B + np.uint64(1))
        z_B = (z_B ^ (z_B >> np.uint64(30))) * _MIX_1
        z_B = (z_B ^ (z_B >> np.uint64(27))) * _MIX_2
        z_B = z_B ^ (z_B >> np.uint64(31))
    units_B: NDArray[np.float64] = (z_B >> np.uint64(11)).astype(np.float64) * _UNIT
    return units_B


def sample(
    logits_BV: torch.Tensor, *, temperatures_B: torch.Tensor, uniforms_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and their logprobs, both [B].

    Temperature 0 returns the most likely token (the first of equals) and its logprob at temperature 1. Otherwise the
    token is drawn by inverting the cumulative distribution at the given uniform, and the logprob is that of the
    distribution sampled from.
    """
    is_greedy_B = temperatures_B == 0
    scaled_BV = logits_BV.float() / torch.where(is_greedy_B, 1.0, temperatures_B)[:, None]
    terms_BV, _, normalizers_B = exponentials(scaled_BV)
    cumulative_BV = terms_BV.double().cumsum(dim=-1)
    thresholds_B1 = (uniforms_B.double() * cumulative_BV[:, -1])[:, None]
    drawn_B = torch.searchsorted(cumulative_BV, thresholds_B1, right=True)[:, 0].clamp_max(logits_BV.shape[-1] - 1)
    tokens_B = torch.where(is_greedy_B, logits_BV.argmax(dim=-1), drawn_B)
    return tokens_B, scaled_BV.gather(1, tokens_B[:, None])[:, 0] - normalizers_B
