"""The quantisation formats, one row each; no code outside `quant/` depends on a particular format.

In memory every format is a `grids.Quantized`: int8 codes and bf16 scales, whose product rounded to bf16 is the weight.
Training, rollout and evaluation compute with these. A format defines how they are stored, their entry in config.json,
and which programs read them. docs/add-a-quantisation-format.md shows how to add one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor

from moetrain.errors import CheckpointError
from moetrain.quant import codec_int4, codec_mxfp4
from moetrain.quant.config import FormatName
from moetrain.quant.consumers import Consumer
from moetrain.quant.grids import Quantized

_MARLIN_GROUPS = (32, 64, 128)
"""Group sizes that vLLM's INT4 kernels for experts support."""
_Q4_0_GROUP = 32
"""Weights of a Q4_0 block in GGUF, which have one scale."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A quantisation format (a row of `FORMATS`): how a matrix is stored, and which programs can read it."""

    title: str
    """Display name."""
    suffixes: tuple[str, ...]
    """Suffixes of the stored tensors of one matrix; no other tensor has such a suffix."""
    dtypes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By suffix, the dtypes that are read, as safetensors names them; of suffixes that are not here every dtype is."""
    codes_per_element: int
    """Number of codes in one element of the stored codes, the tensor of the first suffix."""
    encode: Callable[[Quantized], dict[str, Tensor]]
    """Maps one matrix [out, in] to its stored tensors, by suffix."""
    decode: Callable[[Mapping[str, Tensor]], Quantized]
    """The inverse of `encode`. Raises CheckpointError if the tensors are inconsistent."""
    compression: str
    """Name of the format in compressed-tensors."""
    weights: Mapping[str, Any]
    """QuantizationArgs of the weights for compressed-tensors, without the group size."""
    obstacles: Callable[[Consumer, int], list[str]]
    """Returns the reasons why a consumer cannot read the format at a group size; empty if it can."""

    def named(self, prefix: str, quantized: Quantized) -> dict[str, Tensor]:
        """Return the tensors of one matrix by full name, for the module `prefix`."""
        return {prefix + suffix: tensor for suffix, tensor in self.encode(quantized).items()}

    def read(self, prefix: str, tensors: Mapping[str, Tensor]) -> Quantized:
        """Return the matrix of the module `prefix`: the inverse of `named`.

        Raises CheckpointError if a tensor is missing or inconsistent with the others.
        """
        for suffix in self.suffixes:
            if prefix + suffix not in tensors:
                raise CheckpointError(
                    f"{prefix + suffix} is missing: a matrix in {self.title} requires {', '.join(self.suffixes)}"
                )
        try:
            return self.decode({suffix: tensors[prefix + suffix] for suffix in self.suffixes})
        except CheckpointError as error:
            raise CheckpointError(f"{prefix}: {error}") from error


def _int4_obstacles(consumer: Consumer, group_size: int) -> list[str]:
    if consumer is Consumer.vllm and group_size not in _MARLIN_GROUPS:
        return [f"quant.group_size={group_size}: its INT4 kernels take {', '.join(map(str, _MARLIN_GROUPS))}"]
    if consumer is Consumer.llama_cpp and group_size != _Q4_0_GROUP:
        return [f"quant.group_size={group_size}: its Q4_0 blocks take {_Q4_0_GROUP}"]
    return []


def _mxfp4_obstacles(consumer: Consumer, _: int) -> list[str]:
    if consumer is Consumer.llama_cpp:
        return ["quant.format=mxfp4: Q4_0 blocks hold int4 codes only"]
    if consumer is Consumer.vllm:
        return ["quant.format=mxfp4: not checked with weights alone quantised"]
    return []


FORMATS: Mapping[FormatName, Format] = MappingProxyType(
    {
        FormatName.int4: Format(
            title="INT4",
            suffixes=codec_int4.SUFFIXES,
            dtypes=codec_int4.DTYPES,
            codes_per_element=8,
            encode=codec_int4.encode,
            decode=codec_int4.decode,
            compression="pack-quantized",
            # As in the released Kimi K2 Thinking.
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
            dtypes=codec_mxfp4.DTYPES,
            codes_per_element=2,
            encode=codec_mxfp4.encode,
            decode=codec_mxfp4.decode,
            compression="mxfp4-pack-quantized",
            # As in compressed-tensors' preset MXFP4A16: only the weights are quantised.
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
"""All formats that a config can select."""
