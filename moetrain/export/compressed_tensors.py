"""Converts quantised experts to and from the layout of compressed-tensors: tensors by name, and part of config.json.

Nothing is rounded here: `quant.grids` computes codes and scales, and `quant.formats` packs them.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from moetrain.hf.names import fused_tensors, hf_disk_tensors
from moetrain.quant.config import QuantConfig
from moetrain.quant.formats import FORMATS, Format
from moetrain.quant.grids import Quantized

_WEIGHT_SUFFIX = ".weight"


def quantization_config(quant: QuantConfig, *, ignore: Iterable[str]) -> dict[str, Any]:
    """Return config.json's `quantization_config`: every linear layer is packed, except those named in `ignore`.

    compressed-tensors refuses unknown keys, so there are no others.
    """
    row = FORMATS[quant.format]
    return {
        "quant_method": "compressed-tensors",
        "format": row.compression,
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": sorted(ignore),
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**row.weights, "group_size": quant.group_size},
                "input_activations": None,
                "output_activations": None,
            }
        },
    }


def packed_tensors(
    name: str, quantized: Quantized, *, format: Format, first_expert: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name on disk, tensor) of the format's tensors, for each expert and projection of the fused tensor `name`.

    first_expert: number of the first expert in `quantized`.
    """
    codes = hf_disk_tensors({name: quantized.codes_XOI}, first_expert=first_expert)
    scales = hf_disk_tensors({name: quantized.scales_XOG}, first_expert=first_expert)
    for (disk_name, codes_OI), (_, scales_OG) in zip(codes, scales, strict=True):
        one = Quantized(codes_XOI=codes_OI, scales_XOG=scales_OG)
        yield from format.named(disk_name.removesuffix(_WEIGHT_SUFFIX), one).items()


def unpacked_experts(tensors: Mapping[str, Tensor], *, format: Format) -> dict[str, Quantized]:
    """Return fused codes and scales by name in memory, from the format's tensors by name on disk.

    Raises CheckpointError when a tensor of a matrix, or a matrix of an expert, is missing.
    """
    prefixes = dict.fromkeys(module_of(name, format=format) for name in tensors)
    matrices = {prefix: format.read(prefix, tensors) for prefix in prefixes}
    codes = fused_tensors({prefix + _WEIGHT_SUFFIX: one.codes_XOI for prefix, one in matrices.items()})
    scales = fused_tensors({prefix + _WEIGHT_SUFFIX: one.scales_XOG for prefix, one in matrices.items()})
    return {name: Quantized(codes_XOI=codes[name], scales_XOG=scales[name]) for name in codes}


def module_of(name: str, *, format: Format) -> str:
    """Return the module that a packed tensor on disk belongs to."""
    suffix = next(suffix for suffix in format.suffixes if name.endswith(suffix))
    return name.removesuffix(suffix)
