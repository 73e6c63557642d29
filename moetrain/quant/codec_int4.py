"""Conversion between INT4 codes and scales and the tensors of a `pack-quantized` file: bits only, no rounding.

The layout is that of compressed-tensors: eight codes per int32 word along the inputs, code j of a word in bits 4j to 4j
+ 3, stored as code + 8. Words are built from their bytes, least significant first.

Shape letters as in `grids`; W words (I / 8), B bytes (I / 2).
"""

import sys
from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor

from moetrain.errors import CheckpointError
from moetrain.quant.grids import Quantized

CODE_OFFSET = 8
SUFFIXES = (".weight_packed", ".weight_scale", ".weight_shape")
DTYPES = dict(zip(SUFFIXES, (("I32",), ("BF16", "F16", "F32", "F64"), ("I32", "I64")), strict=True))
"""By suffix, the dtypes that are read, as safetensors names them."""


def pack(codes_XOI: Tensor) -> Tensor:
    """Return int8 codes [..., in] of -8 to 7 as int32 words [..., in / 8]; `in` must be a multiple of 8."""
    assert sys.byteorder == "little", "words are built from bytes, least significant first"
    nibbles_XOB2 = rearrange((codes_XOI + CODE_OFFSET).to(torch.uint8), "... (B two) -> ... B two", two=2)
    bytes_XOB = nibbles_XOB2[..., 0] | (nibbles_XOB2[..., 1] << 4)
    words_XOW: Tensor = bytes_XOB.contiguous().view(torch.int32)
    return words_XOW


def unpack(words_XOW: Tensor) -> Tensor:
    """Return the int8 codes [..., 8 * words] of int32 words: the inverse of `pack`."""
    assert sys.byteorder == "little", "words are read as bytes, least significant first"
    bytes_XOB = words_XOW.contiguous().view(torch.uint8)
    nibbles_XOB2 = torch.stack((bytes_XOB & 0xF, bytes_XOB >> 4), dim=-1)
    return rearrange(nibbles_XOB2, "... B two -> ... (B two)").to(torch.int8) - CODE_OFFSET


def encode(quantized: Quantized) -> dict[str, Tensor]:
    """Return the three stored tensors of one matrix [out, in], by suffix."""
    shape = torch.tensor(quantized.codes_XOI.shape, dtype=torch.int32)
    packed_OW, scales_OG = pack(quantized.codes_XOI), quantized.scales_XOG.contiguous()
    return dict(zip(SUFFIXES, (packed_OW, scales_OG, shape), strict=True))


def decode(tensors: Mapping[str, Tensor]) -> Quantized:
    """Return the matrix stored in three tensors, given by suffix. Raises CheckpointError if they are inconsistent."""
    packed_OW, scales_OG, stated = (tensors[suffix] for suffix in SUFFIXES)
    codes_OI, shape = unpack(packed_OW), stated.tolist()
    if list(codes_OI.shape) != shape:
        raise CheckpointError(f"weight_packed contains {list(codes_OI.shape)} codes, but weight_shape is {shape}")
    if scales_OG.shape[:-1] != codes_OI.shape[:-1] or codes_OI.shape[-1] % scales_OG.shape[-1]:
        raise CheckpointError(f"scales of shape {list(scales_OG.shape)} do not fit codes of shape {shape}")
    return Quantized(codes_XOI=codes_OI, scales_XOG=scales_OG)
