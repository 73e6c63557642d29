"""MXFP4 against a scalar reference, against compressed-tensors, and through training, export and verification."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams

from moetrain.commands.verify import ExportFault
from moetrain.errors import CheckpointError, ConfigError
from moetrain.export.config import exported_quant
from moetrain.export.read import read_export
from moetrain.quant.codec_mxfp4 import decode, encode
from moetrain.quant.config import FormatName, GridName, QuantConfig
from moetrain.quant.fake_quant import FakeQuantizer
from moetrain.quant.grids import Quantized, dequantize, quantize
from moetrain.run.weights import read_weights
from moetrain.verify.exports import verify_exports
from moetrain.verify.table import check_rows
from tests.verify.test_exports import shape, write_export

CONFIG = QuantConfig(enabled=True, format=FormatName.mxfp4, grid=GridName.mx)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _weights(kind: str) -> torch.Tensor:
    normal = torch.randn(40, 64, generator=torch.Generator().manual_seed(7))
    return {"gauss": 0.02 * normal, "wide": normal * torch.logspace(-4, 3, 64)}[kind]


def _quantize(weight: torch.Tensor) -> Quantized:
    return quantize(weight, grid=GridName.mx, group_size=32)


def _reference_group(values: list[float]) -> list[float]:
    """The rule of docs/numerics.md, one number at a time, with real numbers."""
    rounded = [float(torch.tensor(value).bfloat16()) for value in values]
    amax = max(map(abs, rounded))
    exponent = math.floor(math.log2(amax))
    scale = 2.0 ** (exponent - 2 + (amax / 2**exponent >= 1.75))
    nearest = [min(E2M1, key=lambda x: (abs(abs(v) / scale - x), E2M1.index(x) % 2)) for v in rounded]
    return [math.copysign(x * scale, v) for x, v in zip(nearest, rounded, strict=True)]


@pytest.mark.parametrize("kind", ["gauss", "wide"])
def test_the_dequantised_weights_equal_a_scalar_reference(kind: str) -> None:
    weight = _weights(kind)[:6]
    found = dequantize(_quantize(weight)).float()
    for row in range(6):
        for columns in (slice(0, 32), slice(32, 64)):
            assert found[row, columns].tolist() == _reference_group(weight[row, columns].tolist())


def test_ties_go_to_the_even_mantissa_and_the_largest_weight_decides_the_scale() -> None:
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    weight = torch.zeros(2, 32)
    weight[0, :8] = torch.tensor([6.0, *ties])
    weight[1, :2] = torch.tensor([7.0, 1.0])  # as near to 8 as to 6: the scale is 2
    found = dequantize(_quantize(weight)).float()
    assert found[0, :8].tolist() == [6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert found[1, :2].tolist() == [8.0, 1.0]


def test_scales_and_bytes_are_those_of_compressed_tensors() -> None:
    weight = _weights("gauss").bfloat16()
    grouped = weight.view(40, 2, 32)
    quantized = _quantize(weight)
    args = QuantizationArgs(
        num_bits=4, type="float", symmetric=True, strategy="group", group_size=32,
        scale_dtype=torch.uint8, zp_dtype=torch.uint8,
    )  # fmt: skip
    scales, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    assert torch.equal(quantized.scales_XOG.float() * 2, scales.float())
    stored = encode(quantized)
    assert torch.equal(stored[".weight_packed"], pack_fp4_to_uint8(quantized.codes_XOI.bfloat16() / 2))
    assert torch.equal(stored[".weight_scale"], (127 + torch.log2(scales.float())).to(torch.uint8))


def test_tensors_that_do_not_fit_are_refused() -> None:
    stored = encode(_quantize(_weights("gauss")))
    with pytest.raises(CheckpointError, match=r"scales of shape \[40, 3\] do not fit codes of \[40, 64\]"):
        decode({**stored, ".weight_scale": torch.zeros(40, 3, dtype=torch.uint8)})
    with pytest.raises(CheckpointError, match="weight_scale contains the byte 255, which means NaN"):
        decode({**stored, ".weight_scale": torch.full((40, 2), 255, dtype=torch.uint8)})
    with pytest.raises(CheckpointError, match=r"weight_scale is torch.bfloat16: MXFP4 is stored as uint8"):
        decode({**stored, ".weight_scale": torch.ones(40, 2, dtype=torch.bfloat16)})


def test_format_and_grid_and_group_size_must_fit() -> None:
    with pytest.raises(ConfigError, match=r"quant.grid is kimi7: quant.format=mxfp4 stores mx; .*quant=mxfp4"):
        QuantConfig(format=FormatName.mxfp4)
    with pytest.raises(ConfigError, match=r"quant.group_size is 64: quant.format=mxfp4 takes 32"):
        QuantConfig(format=FormatName.mxfp4, grid=GridName.mx, group_size=64)


def test_fake_quantisation_computes_the_exported_numbers_and_passes_the_gradient_on() -> None:
    master = torch.nn.Parameter(_weights("gauss"))
    weight = FakeQuantizer(grid=CONFIG.grid, group_size=CONFIG.group_size)(master, torch.bfloat16)
    assert torch.equal(weight, dequantize(_quantize(master)))
    upstream = torch.randn(40, 64).bfloat16()
    weight.backward(upstream)
    assert master.grad is not None
    assert torch.equal(master.grad, upstream.float())


def test_an_export_keeps_every_promise_and_planted_faults_are_found(tmp_path: Path) -> None:
    masters = write_export(tmp_path / "mxfp4", shape(), quant=CONFIG)
    check_rows(verify_exports(tmp_path / "mxfp4", masters=masters))
    for fault in (ExportFault.code, ExportFault.scale):
        rows = verify_exports(tmp_path / "mxfp4", masters=masters, fault=fault)
        assert [row.name for row in rows if not row.is_kept]
    export = read_export(tmp_path / "mxfp4")
    assert export.quant == CONFIG
    assert export.record["report"]["format"] == "mxfp4"
    assert export.record["consumers"]["transformers"] == [] and export.record["consumers"]["llama_cpp"] != []
    origin = read_weights(str(tmp_path / "mxfp4"))
    name = next(name for name in masters if name.endswith("down_proj") and ".experts." in name)
    assert origin.quant == CONFIG
    assert torch.equal(origin.tensors[name], dequantize(quantize(masters[name], grid=GridName.mx, group_size=32)))
    assert exported_quant(origin.quant, given=QuantConfig()) == exported_quant(origin.quant, given=CONFIG) == CONFIG
    for given in (QuantConfig(enabled=True), QuantConfig(group_size=64)):  # it would keep mxfp4, whatever is asked for
        with pytest.raises(
            ConfigError, match=r"quant\.\w+ is \w+, and the weights were trained with \w+: leave quant out"
        ):
            exported_quant(origin.quant, given=given)
    untrained = replace(origin, quant=None)
    assert exported_quant(untrained.quant, given=CONFIG) == CONFIG
    with pytest.raises(ConfigError, match=r"quant\.enabled is false: give quant=int4"):
        exported_quant(untrained.quant, given=QuantConfig(group_size=64))
