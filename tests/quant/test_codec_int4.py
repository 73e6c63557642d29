"""Packed words against compressed-tensors' own, and the round trip."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as library_dequantize

from moetrain.errors import CheckpointError
from moetrain.quant.codec_int4 import pack, unpack
from moetrain.quant.config import FormatName, GridName
from moetrain.quant.formats import FORMATS
from moetrain.quant.grids import dequantize, quantize

INT4 = FORMATS[FormatName.int4]


def _codes() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(-8, 8, (3, 24, 64), generator=generator, dtype=torch.int8)


def test_words_are_bit_equal_to_those_of_compressed_tensors() -> None:
    codes = _codes()
    assert torch.equal(pack(codes), pack_to_int32(codes, 4))
    assert torch.equal(unpack(pack(codes)), unpack_from_int32(pack(codes), 4, codes.shape))


def test_unpack_inverts_pack() -> None:
    codes = _codes()
    assert torch.equal(unpack(pack(codes)), codes)


def test_compressed_tensors_dequantises_the_encoded_matrix_to_the_same_bits() -> None:
    weight = 0.02 * torch.randn(24, 64, generator=torch.Generator().manual_seed(5))
    quantized = quantize(weight, grid=GridName.kimi7, group_size=32)
    tensors = INT4.named("m", quantized)
    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    codes = unpack_from_int32(tensors["m.weight_packed"], 4, torch.Size(tensors["m.weight_shape"].tolist()))
    theirs = library_dequantize(x_q=codes, scale=tensors["m.weight_scale"], args=args)
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs, dequantize(quantized))


def test_decode_inverts_encode_and_names_what_is_missing_or_wrong() -> None:
    quantized = quantize(torch.randn(8, 64), grid=GridName.kimi7, group_size=32)
    tensors = INT4.named("m", quantized)
    back = INT4.read("m", tensors)
    assert torch.equal(back.codes_XOI, quantized.codes_XOI)
    assert torch.equal(back.scales_XOG, quantized.scales_XOG)
    with pytest.raises(CheckpointError, match=r"m\.weight_scale is missing"):
        INT4.read("m", {name: t for name, t in tensors.items() if "scale" not in name})
    with pytest.raises(CheckpointError, match=r"weight_shape is \[8, 32\]"):
        INT4.read("m", tensors | {"m.weight_shape": torch.tensor([8, 32], dtype=torch.int32)})
