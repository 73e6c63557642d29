"""Every format against what all of them promise, and nothing outside `quant/` that names one."""

import ast
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

from moetrain.checkpoint.identity import quant_of, upgraded
from moetrain.checkpoint.read import Checkpoint, TensorFiles
from moetrain.checkpoint.resume import check_identity
from moetrain.errors import CheckpointError, ConfigError
from moetrain.export.compressed_tensors import quantization_config
from moetrain.quant.config import LIMITS, FormatName, GridName, QuantConfig, quant_config
from moetrain.quant.formats import FORMATS
from moetrain.quant.grids import Quantized, dequantize, quantize

PACKAGE = Path(__file__).resolve().parents[2] / "moetrain"
PAIRS = [(name, grid) for name, limits in LIMITS.items() for grid in limits.grids]


def _quantized(grid: GridName) -> Quantized:
    weight = 0.02 * torch.randn(24, 64, generator=torch.Generator().manual_seed(5))
    weight[3, :32] = 0.0
    return quantize(weight, grid=grid, group_size=32)


def test_every_name_has_a_row_and_limits_and_every_grid_a_format() -> None:
    assert set(FORMATS) == set(LIMITS) == set(FormatName)
    assert {grid for _, grid in PAIRS} == set(GridName)


@pytest.mark.parametrize(("name", "grid"), PAIRS)
def test_reading_a_matrix_gives_the_codes_and_scales_that_were_stored(name: FormatName, grid: GridName) -> None:
    row, quantized = FORMATS[name], _quantized(grid)
    tensors = row.named("m", quantized)
    assert set(tensors) == {"m" + suffix for suffix in row.suffixes}
    back = row.read("m", tensors)
    assert torch.equal(back.codes_XOI, quantized.codes_XOI)
    assert torch.equal(back.scales_XOG, quantized.scales_XOG)
    for suffix in row.suffixes:
        with pytest.raises(CheckpointError, match=rf"m\{suffix} is missing: a matrix in {row.title} requires"):
            row.read("m", {key: tensor for key, tensor in tensors.items() if not key.endswith(suffix)})


@pytest.mark.parametrize(("name", "grid"), PAIRS)
def test_compressed_tensors_unpacks_what_is_stored_to_the_same_bits(name: FormatName, grid: GridName) -> None:
    config = QuantConfig(format=name, grid=grid)
    stated = quantization_config(config, ignore=[])
    row, quantized = FORMATS[name], _quantized(grid)
    stored = {suffix.removeprefix("."): tensor for suffix, tensor in row.encode(quantized).items()}
    scheme = QuantizationScheme.model_validate(stated["config_groups"]["group_0"])
    assert QuantizationConfig.model_validate(stated).format == row.compression
    compressor = BaseCompressor.get_value_from_registry(row.compression)
    theirs = compressor.decompress(stored, scheme)["weight"]
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs, dequantize(quantized))


@pytest.mark.parametrize(("name", "grid"), PAIRS)
def test_quantising_what_was_quantised_moves_nothing(name: FormatName, grid: GridName) -> None:
    once = _quantized(grid)
    again = quantize(dequantize(once), grid=grid, group_size=32)
    assert torch.equal(once.codes_XOI, again.codes_XOI)
    assert torch.equal(once.scales_XOG, again.scales_XOG)


def test_fields_without_a_format_are_those_of_an_older_version_and_mean_int4() -> None:
    older = {"enabled": True, "grid": "kimi7", "group_size": 64}
    assert quant_config(older) == QuantConfig(enabled=True, group_size=64)
    assert quant_of({"quant": older}).format is FormatName.int4
    state = {"identity": {"seed": 1, "quant": older}}
    tensors = TensorFiles(Path(), {})
    loaded = Checkpoint(path=Path("step_1"), step=1, state=state, tensors=tensors, files={}, digest="")
    check_identity(loaded, {"seed": 1, "quant": asdict(quant_config(older))})
    with pytest.raises(CheckpointError, match=r"quant\.format: int4 -> mxfp4"):
        check_identity(loaded, {"seed": 1, "quant": {**asdict(quant_config(older)), "format": "mxfp4"}})
    assert upgraded({"seed": 1, "quant": older}) == {"seed": 1, "quant": asdict(quant_config(older))}


@pytest.mark.parametrize("group_size", [0, 4, 20, -8])
def test_a_group_size_that_the_format_does_not_store_is_refused(group_size: int) -> None:
    with pytest.raises(ConfigError, match=f"quant.group_size is {group_size}: quant.format=int4 takes a multiple of 8"):
        QuantConfig(group_size=group_size)


def test_no_format_and_no_grid_is_named_outside_of_quant() -> None:
    named = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        if path.parent.name != "quant"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("FormatName", "GridName")
    ]
    assert not named, f"{named}: ask the row of quant.formats.FORMATS or quant.grids.GRIDS instead"
