"""The quantisation formats: one row each, and nothing outside `quant/` names one.

In memory every format is `grids.Quantized`: int8 codes and bf16 scales whose product, rounded to bf16, is the weight.
Training, rollout and evaluation compute with those. A format adds how they are stored, what config.json says of them,
and which programs read them. docs/add-a-quantisation-format.md shows how to add one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from moetrain.errors import CheckpointError
from moetrain.quant import codec_int4, codec_mxfp4
from moetrain.quant.config import FormatName
from moetrain.quant.consumers import Consumer
from moetrain.quant.grids import Quantized

_MARLIN_GROUPS = (32, 64, 128)
"""Group sizes that vLLM's INT4 kernels for experts take."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A row of `FORMATS`."""

    title: str
    """Its name in tables."""
    suffixes: tuple[str, ...]
    """Suffixes of the tensors on disk that hold one matrix; no other tensor ends in one."""
    encode: Callable[[Quantized], dict[str, Tensor]]
    """One matrix [out, in] -> its tensors on disk by suffix."""
    decode: Callable[[Mapping[str, Tensor]], Quantized]
    """The inverse of `encode`. Raises CheckpointError when the tensors do not agree."""
    compression: str
    """Its name in compressed-tensors."""
    weights: Mapping[str, Any]
    """compressed-tensors' QuantizationArgs of the weights, without the group size."""
    obstacles: Callable[[Consumer, int], list[str]]
    """Why a consumer does not read it at a group size; empty when it does."""

    def named(self, prefix: str, quantized: Quantized) -> dict[str, Tensor]:
        """Return the tensors of one matrix by full name, after the module `prefix`."""
        return {prefix + suffix: tensor for suffix, tensor in self.encode(quantized).items()}

    def read(self, prefix: str, tensors: Mapping[str, Tensor]) -> Quantized:
        """Return the matrix of the module `prefix`: the inverse of `named`.

        Raises CheckpointError when one of its tensors is missing or does not fit the others.
        """
        for suffix in self.suffixes:
            if prefix + suffix not in tensors:
                raise CheckpointError(
                    f"{prefix + suffix} is missing: a matrix in {self.title} has {', '.join(self.suffixes)}"
                )
        try:
            return self.decode({suffix: tensors[prefix + suffix] for suffix in self.suffixes})
        except CheckpointError as error:
            raise CheckpointError(f"{prefix}: {error}") from error


def _int4_obstacles(consumer: Consumer, group_size: int) -> list[str]:
    if consumer is Consumer.vllm and group_size not in _MARLIN_GROUPS:
        return [f"quant.group_size={group_size}: its INT4 kernels take {', '.join(map(str, _MARLIN_GROUPS))}"]
    return []


def _mxfp4_obstacles(consumer: Consumer, _: int) -> list[str]:
    if consumer is Consumer.llama_cpp:
        return ["quant.format=mxfp4: its converter reads packed integers only"]
    if consumer is Consumer.vllm:
        return ["quant.format=mxfp4: not checked with weights alone quantised"]
    return []


FORMATS: Mapping[FormatName, Format] = MappingProxyType(
    {
        FormatName.int4: Format(
            title="INT4",
            suffixes=codec_int4.SUFFIXES,
            encode=codec_int4.encode,
            decode=codec_int4.decode,
            compression="pack-quantized",
            # The keys are those of the released Kimi K2 Thinking.
            weights={
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "dynamic": False,
                "observer": "minmax",
                "observer_kwargs": {},
                "actorder": None,
                "block_structure": None,
            },
            obstacles=_int4_obstacles,
        ),
        FormatName.mxfp4: Format(
            title="MXFP4",
            suffixes=codec_mxfp4.SUFFIXES,
            encode=codec_mxfp4.encode,
            decode=codec_mxfp4.decode,
            compression="mxfp4-pack-quantized",
            # Those of compressed-tensors' preset MXFP4A16: weights alone are quantised.
            weights={
                "num_bits": 4,
                "type": "float",
                "symmetric": True,
                "strategy": "group",
                "dynamic": False,
                "scale_dtype": "torch.uint8",
                "zp_dtype": "torch.uint8",
            },
            obstacles=_mxfp4_obstacles,
        ),
    }
)
"""Every format that can be named in a config."""
