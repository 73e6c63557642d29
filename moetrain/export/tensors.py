"""Which of a model's tensors an export quantises, and in which dtype it stores the others.

Both follow from the model, built on the meta device, and not from patterns over names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moetrain.errors import CheckpointError
from moetrain.hf.names import MTP_COPIES
from moetrain.model.config import ModelConfig
from moetrain.model.transformer import Transformer
from moetrain.parallel.protocol import StateReader
from moetrain.parallel.state import CHUNK_ELEMENTS

_EMBEDDING = "model.embed_tokens.weight"
_OPTIMIZER_PREFIX = "optimizer/"


@dataclass(frozen=True, kw_only=True)
class FolderTensors:
    """Shapes of a model's tensors by name in memory, and how an export stores each tensor."""

    shapes: Mapping[str, torch.Size]
    """Shape of every tensor of the model."""
    experts: frozenset[str]
    """Fused tensors of the routed experts."""
    float32: frozenset[str]
    """Tensors that the forward pass uses in float32: gains of norms, router weights, balance biases."""
    unquantized_linears: list[str]
    """Names of modules with a matrix, except the routed experts and the embedding."""
    copies: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Copies that a folder has of other tensors, by name, and of what; by the tensor before which they are written."""

    def stored(self, name: str, tensor: Tensor) -> Tensor:
        """Return an unquantised tensor in its stored dtype: fp32 if the forward pass reads it in fp32, else bf16.

        One that comes in bf16, as in a released folder, stays so.
        """
        if name in self.float32 and tensor.dtype is not torch.bfloat16:
            return tensor.to(torch.float32)
        return tensor.to(torch.bfloat16)

    def check_shapes(self, reader: StateReader) -> None:
        """Raise CheckpointError when a tensor is missing, unknown or of another shape. No values are read.

        Ignored are optimizer state, and tensors without elements: see `parallel.state.check`.
        """
        found = {
            name: shape
            for name, shape in reader.shapes().items()
            if not name.startswith(_OPTIMIZER_PREFIX) and 0 not in shape
        }
        for name in sorted(self.shapes.keys() - found.keys()):
            raise CheckpointError(f"{name} is missing: the weights do not fit this model, copy or export them again")
        for name in sorted(found.keys() - self.shapes.keys()):
            raise CheckpointError(
                f"{name} is not a tensor of this model: the weights do not fit it, copy or export them again"
            )
        for name, shape in self.shapes.items():
            if tuple(found[name]) != tuple(shape):
                raise CheckpointError(f"{name} has shape {list(found[name])}, but this model requires {list(shape)}")

    def check(self, reader: StateReader) -> None:
        """Raise CheckpointError as `check_shapes`, and when a tensor contains non-finite values."""
        self.check_shapes(reader)
        finite = FiniteReader(reader)
        for name, shape in self.shapes.items():
            for first in range(0, shape.numel(), CHUNK_ELEMENTS):
                finite.read(name, first=first, last=min(first + CHUNK_ELEMENTS, shape.numel()))


class FiniteReader:
    """Implements `StateReader` over another one and checks what it reads."""

    def __init__(self, reader: StateReader) -> None:
        self._reader = reader

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return name and shape of every tensor."""
        return self._reader.shapes()

    def read(self, name: str, *, first: int, last: int) -> Tensor:
        """Return the elements [first, last) of a flattened tensor. Raises CheckpointError if one is not finite."""
        values = self._reader.read(name, first=first, last=last)
        if not bool(torch.isfinite(values).all()):
            raise CheckpointError(f"{name} holds numbers that are not finite: use an earlier checkpoint")
        return values


def folder_tensors(config: ModelConfig) -> FolderTensors:
    """Return the tensors of an exported model of this shape."""
    with torch.device("meta"):
        model = Transformer(config)
    routers = {f"{name}.gate.weight" for name, _ in model.moe_layers()}
    experts = {f"{name}.experts.{kind}" for name, _ in model.moe_layers() for kind in ("gate_up_proj", "down_proj")}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    matrices = [name for name, shape in shapes.items() if len(shape) == 2 and name != _EMBEDDING]
    modules = [f"model.layers.{config.num_layers + index}." for index in range(config.num_mtp_layers)]
    copies = {f"{module}enorm.weight": {module + copy: of for copy, of in MTP_COPIES.items()} for module in modules}
    matrices += [f"{module}{copy}" for module in modules for copy in MTP_COPIES if copy != "embed_tokens.weight"]
    return FolderTensors(
        shapes=shapes,
        experts=frozenset(experts),
        float32=frozenset(routers | {name for name, shape in shapes.items() if len(shape) == 1}),
        unquantized_linears=[name.removesuffix(".weight") for name in matrices],
        copies=copies,
    )
