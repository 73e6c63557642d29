"""Conversion between MXFP4 codes and scales and the tensors of a `mxfp4-pack-quantized` file: bits only, no rounding.

The layout is that of compressed-tensors (OCP Microscaling Formats 1.0): e2m1 numbers, two per byte along the inputs,
the first in the low bits, with the sign in bit 3; one e8m0 scale per group, where the byte b means 2^(b - 127).

In memory a code counts halves, so that it is an integer (`grids`); its scale is half of the stored one.

Shape letters as in `grids`; B bytes (I / 2).
"""

from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor

from moetrain.errors import CheckpointError
from moetrain.quant.grids import E2M1_HALVES, Quantized

SUFFIXES = (".weight_packed", ".weight_scale")
DTYPES = dict.fromkeys(SUFFIXES, ("U8",))
"""By suffix, the dtypes that are read, as safetensors names them."""
_SIGN = 8
_EXPONENT_BIAS = 127
_NAN = 255


def encode(quantized: Quantized) -> dict[str, Tensor]:
    """Return the two stored tensors of one matrix [out, in], by suffix."""
    codes_OI = quantized.codes_XOI
    halves = torch.tensor(E2M1_HALVES, device=codes_OI.device)
    nibbles_OI = torch.searchsorted(halves, codes_OI.abs().to(halves.dtype)) + _SIGN * (codes_OI < 0)
    nibbles_OB2 = rearrange(nibbles_OI.to(torch.uint8), "... (B two) -> ... B two", two=2)
    # The mantissa of frexp is 0.5, so its exponent is one too high.
    _, exponents_OG = torch.frexp(2 * quantized.scales_XOG.float())
    scales_OG = (exponents_OG - 1 + _EXPONENT_BIAS).to(torch.uint8)
    return dict(zip(SUFFIXES, (nibbles_OB2[..., 0] | (nibbles_OB2[..., 1] << 4), scales_OG), strict=True))


def decode(tensors: Mapping[str, Tensor]) -> Quantized:
    """Return the matrix stored in two tensors, given by suffix. Raises CheckpointError if they are inconsistent.

    The code of minus zero becomes that of zero; the value is the same.
    """
    packed_OB, bytes_OG = (tensors[suffix] for suffix in SUFFIXES)
    for suffix, tensor in tensors.items():
        if tensor.dtype is not torch.uint8:
            raise CheckpointError(f"{suffix.removeprefix('.')} is {tensor.dtype}: MXFP4 is stored as uint8")
    nibbles_OI = rearrange(torch.stack((packed_OB & 0xF, packed_OB >> 4), dim=-1), "... B two -> ... (B two)")
    if bytes_OG.shape[:-1] != nibbles_OI.shape[:-1] or nibbles_OI.shape[-1] % max(bytes_OG.shape[-1], 1):
        raise CheckpointError(f"scales of shape {list(bytes_OG.shape)} do not fit codes of {list(nibbles_OI.shape)}")
    if bool((bytes_OG == _NAN).any()):
        raise CheckpointError(f"{SUFFIXES[1].removeprefix('.')} contains the byte {_NAN}, which means NaN")
    halves = torch.tensor(E2M1_HALVES, dtype=torch.int8, device=packed_OB.device)
    codes_OI = halves[(nibbles_OI % _SIGN).long()] * torch.where(nibbles_OI < _SIGN, 1, -1).to(torch.int8)
    exponents_OG = bytes_OG.to(torch.int32) - _EXPONENT_BIAS - 1
    scales_OG = torch.ldexp(torch.ones(exponents_OG.shape, device=packed_OB.device), exponents_OG).to(torch.bfloat16)
    return Quantized(codes_XOI=codes_OI, scales_XOG=scales_OG)
