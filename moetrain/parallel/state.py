"""The layout-independent training state: tensor names and shapes, checks, gathering of pieces, loading.

P elements of a piece.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn

from moetrain.errors import CheckpointError
from moetrain.model.config import ModelConfig
from moetrain.model.transformer import Transformer
from moetrain.optim.config import OptimizerName
from moetrain.optim.muon import parameter_rule
from moetrain.parallel.protocol import Piece, StateReader
from moetrain.parallel.topology import Topology

STEP = "optimizer/step"
CHUNK_ELEMENTS = 1 << 22
"""Elements that are read at once, so that loading needs 16 MB beside the model, whatever the size of its tensors."""
STATE_NAMES = {OptimizerName.muon: ("momentum",), OptimizerName.adamw: ("exp_avg", "exp_avg_sq")}


def optimizer_key(name: str, state: str) -> str:
    """Return the name in the state of the optimizer tensor `state` of the parameter `name`."""
    return f"optimizer/{name}/{state}"


def expert_parameter_names(model: Transformer) -> set[str]:
    """Return the names of the parameters whose first axis is the expert."""
    return {
        f"{layer_name}.experts.{name}"
        for layer_name, layer in model.moe_layers()
        for name, _ in layer.experts.named_parameters()
    }


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the persistent buffers of the model by name, without copying."""
    parameters = {name for name, _ in model.named_parameters()}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}


def global_shapes(
    model: Transformer,
    parameters: Mapping[str, tuple[int, ...]],
    *,
    num_ranks: int,
    hidden_rule: OptimizerName,
    with_optimizer: bool,
) -> dict[str, tuple[int, ...]]:
    """Return the global shape of every tensor of the state, by name.

    parameters: the local shapes, with the experts split over `num_ranks` ranks.
    """
    experts = expert_parameter_names(model)
    shapes: dict[str, tuple[int, ...]] = {name: (*buffer.shape,) for name, buffer in persistent_buffers(model).items()}
    for name, local in parameters.items():
        shape = (local[0] * num_ranks, *local[1:]) if name in experts else (*local,)
        shapes[name] = shape
        if with_optimizer:
            rule = parameter_rule(name, torch.Size(local), hidden_rule=hidden_rule)
            shapes |= {optimizer_key(name, state): shape for state in STATE_NAMES[rule]}
    if with_optimizer:
        shapes[STEP] = ()
    return shapes


class TensorReader:
    """Implements `StateReader` over a mapping of tensors, which may compute or read them on access."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return name and shape of every tensor."""
        return {name: tuple(self._tensors[name].shape) for name in self._tensors}

    def read(self, name: str, *, first: int, last: int) -> torch.Tensor:
        """Return the elements [first, last) of the flattened tensor `name`."""
        return self._tensors[name].reshape(-1)[first:last]


class WithoutMtp:
    """Wraps a `StateReader` and hides the MTP modules after the first `kept`, and their optimizer state."""

    def __init__(self, reader: StateReader, model: ModelConfig, *, kept: int) -> None:
        self._reader = reader
        numbers = range(model.num_layers + kept, model.num_layers + model.num_mtp_layers)
        self._left_out = tuple(f"model.layers.{number}." for number in numbers)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return name and shape of every tensor."""
        shapes = self._reader.shapes()
        return {name: shape for name, shape in shapes.items() if not any(part in name for part in self._left_out)}

    def read(self, name: str, *, first: int, last: int) -> torch.Tensor:
        """Return the elements [first, last) of the flattened tensor `name`."""
        return self._reader.read(name, first=first, last=last)


def gather_pieces(pieces: Iterable[Piece], topology: Topology) -> dict[str, torch.Tensor] | None:
    """Return the whole tensors assembled from the pieces of all ranks, on the CPU of the main rank; None on others.

    Collective. Pieces are sent one at a time. The pieces of a tensor must cover it completely.
    """
    own = list(pieces)
    headers = [(piece.name, piece.shape, piece.start, piece.values_P.numel(), piece.values_P.dtype) for piece in own]
    all_headers = topology.gather_objects(headers)
    if all_headers is None:
        for piece in own:
            dist.send(piece.values_P.contiguous(), dst=0)
        return None
    tensors: dict[str, torch.Tensor] = {}
    num_filled: dict[str, int] = {}
    for rank, rank_headers in enumerate(all_headers):
        for index, (name, shape, start, count, dtype) in enumerate(rank_headers):
            if rank == topology.rank:
                values_P = own[index].values_P
            else:
                values_P = torch.empty(count, dtype=dtype, device=topology.device)
                dist.recv(values_P, src=rank)
            if name not in tensors:
                tensors[name] = torch.empty(shape, dtype=dtype)
            tensors[name].view(-1)[start : start + count].copy_(values_P)
            num_filled[name] = num_filled.get(name, 0) + count
    for name, tensor in tensors.items():
        assert num_filled[name] == tensor.numel(), f"{num_filled[name]} elements of {name} for {tensor.numel()}"
    return tensors


def check(found: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless `found` has the same names and shapes as `shapes`.

    Ignored in `found` are optimizer state if `shapes` contains none, and tensors without elements, such as other
    programs write for the shared experts of a model that has none.
    """
    missing = sorted(name for name in shapes if name not in found)
    if missing:
        raise CheckpointError(
            f"{missing[0]}{_and_others(missing)} is missing: the checkpoint belongs to another model or optimizer"
        )
    extra = sorted(
        name
        for name, shape in found.items()
        if name not in shapes and 0 not in shape and not _is_unwanted_optimizer_state(name, shapes)
    )
    if extra:
        raise CheckpointError(
            f"{extra[0]}{_and_others(extra)} is not in this model or optimizer: the checkpoint belongs to another one"
        )
    for name, shape in shapes.items():
        if tuple(found[name]) != shape:
            raise CheckpointError(f"{name} has shape {tuple(found[name])}, but this model requires {shape}")


def read_into(target: torch.Tensor, reader: StateReader, *, name: str, first: int = 0) -> None:
    """Fill the contiguous `target` with elements of the tensor `name`, starting at `first`, chunk by chunk."""
    flat_P = target.view(-1)
    for start in range(0, flat_P.numel(), CHUNK_ELEMENTS):
        chunk_P = flat_P[start : start + CHUNK_ELEMENTS]
        chunk_P.copy_(reader.read(name, first=first + start, last=first + start + chunk_P.numel()))


def _and_others(names: Iterable[str]) -> str:
    num_others = len(list(names)) - 1
    return f" (and {num_others} more)" if num_others else ""


def _is_unwanted_optimizer_state(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return name.startswith("optimizer/") and STEP not in shapes
