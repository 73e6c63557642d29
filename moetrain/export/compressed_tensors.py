"""The `pack-quantized` form of compressed-tensors: its part of config.json, and experts as packed tensors, both ways.

No rounding happens here: codes and scales come from `quant.grids`, words from `quant.codec`.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from moetrain.errors import CheckpointError
from moetrain.hf.names import fused_tensors, hf_disk_tensors
from moetrain.quant.codec import PACKED_SUFFIX, SCALE_SUFFIX, SHAPE_SUFFIX, decode, encode
from moetrain.quant.config import GridName
from moetrain.quant.grids import GRIDS, Quantized

_WEIGHT_SUFFIX = ".weight"


def quantization_config(*, grid: GridName, group_size: int, ignore: Iterable[str]) -> dict[str, Any]:
    """Return config.json's `quantization_config`: every linear layer is packed but those named in `ignore`.

    The keys are those of the released Kimi K2 Thinking; compressed-tensors refuses any it does not know.
    """
    weights = {
        "num_bits": GRIDS[grid].num_bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group_size,
        "dynamic": False,
        "observer": "minmax",
        "observer_kwargs": {},
        "actorder": None,
        "block_structure": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": sorted(ignore),
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        },
    }


def packed_tensors(name: str, quantized: Quantized, *, first_expert: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yield the fused experts tensor `name` as a packed triple for each expert and projection, by name on disk.

    first_expert: number of the first of the experts that `quantized` holds.
    """
    codes = hf_disk_tensors({name: quantized.codes_XOI}, first_expert=first_expert)
    scales = hf_disk_tensors({name: quantized.scales_XOG}, first_expert=first_expert)
    for (disk_name, codes_OI), (_, scales_OG) in zip(codes, scales, strict=True):
        one = Quantized(codes_XOI=codes_OI, scales_XOG=scales_OG)
        yield from encode(disk_name.removesuffix(_WEIGHT_SUFFIX), one).items()


def is_packed(name: str) -> bool:
    """Return whether a tensor on disk is one of a packed triple."""
    return name.endswith((PACKED_SUFFIX, SCALE_SUFFIX, SHAPE_SUFFIX))


def unpacked_experts(tensors: Mapping[str, Tensor]) -> dict[str, Quantized]:
    """Return fused codes and scales by name in memory, from packed triples by name on disk.

    Raises CheckpointError when a tensor of a triple, or a matrix of an expert, is missing.
    """
    prefixes = [name.removesuffix(PACKED_SUFFIX) for name in tensors if name.endswith(PACKED_SUFFIX)]
    if len(tensors) != 3 * len(prefixes):
        raise CheckpointError(f"{len(tensors)} tensors for {len(prefixes)} packed weights: each has three")
    matrices = {prefix: decode(prefix, tensors) for prefix in prefixes}
    codes = fused_tensors({prefix + _WEIGHT_SUFFIX: one.codes_XOI for prefix, one in matrices.items()})
    scales = fused_tensors({prefix + _WEIGHT_SUFFIX: one.scales_XOG for prefix, one in matrices.items()})
    return {name: Quantized(codes_XOI=codes[name], scales_XOG=scales[name]) for name in codes}
