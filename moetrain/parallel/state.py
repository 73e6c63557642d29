"""Names, shapes and checks of a state that no layout shows in: what `gather_state` returns and `load_state` takes.

L experts of this rank, E experts of a layer.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from moetrain.errors import CheckpointError
from moetrain.model.transformer import Transformer
from moetrain.optim.config import OptimizerName
from moetrain.optim.muon import parameter_rule

STEP = "optimizer/step"
STATE_NAMES = {OptimizerName.muon: ("momentum",), OptimizerName.adamw: ("exp_avg", "exp_avg_sq")}


def optimizer_key(name: str, state: str) -> str:
    """Return the name under which the state tensor `state` of the parameter `name` is kept."""
    return f"optimizer/{name}/{state}"


def expert_parameter_names(model: Transformer) -> set[str]:
    """Return the names of the parameters whose first axis is experts."""
    return {
        f"{layer_name}.experts.{name}"
        for layer_name, layer in model.moe_layers()
        for name, _ in layer.experts.named_parameters()
    }


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that belong to the state, by name; writing to them writes to the model."""
    parameters = {name for name, _ in model.named_parameters()}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}


def global_shapes(
    model: Transformer, *, num_ranks: int, hidden_rule: OptimizerName, with_optimizer: bool
) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of the whole state, when experts are shared by `num_ranks` ranks."""
    experts = expert_parameter_names(model)
    shapes: dict[str, tuple[int, ...]] = {name: (*buffer.shape,) for name, buffer in persistent_buffers(model).items()}
    for name, param in model.named_parameters():
        shape = (param.shape[0] * num_ranks, *param.shape[1:]) if name in experts else (*param.shape,)
        shapes[name] = shape
        if with_optimizer:
            rule = parameter_rule(name, param.shape, hidden_rule=hidden_rule)
            shapes |= {optimizer_key(name, state): shape for state in STATE_NAMES[rule]}
    if with_optimizer:
        shapes[STEP] = ()
    return shapes


def check(tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless `tensors` holds the names of `shapes` in their shapes, and no others.

    Optimizer state that nobody asked for may be there.
    """
    missing = sorted(name for name in shapes if name not in tensors)
    if missing:
        raise CheckpointError(
            f"{missing[0]}{_and_others(missing)} is missing: the state is of another model or optimizer"
        )
    extra = sorted(name for name in tensors if name not in shapes and not _is_unwanted_optimizer_state(name, shapes))
    if extra:
        raise CheckpointError(
            f"{extra[0]}{_and_others(extra)} is not in this model or optimizer: the state is of another"
        )
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(f"{name} has shape {tuple(tensors[name].shape)}, this model has {shape}")


def _and_others(names: Iterable[str]) -> str:
    num_others = len(list(names)) - 1
    return f" (and {num_others} more)" if num_others else ""


def _is_unwanted_optimizer_state(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return name.startswith("optimizer/") and STEP not in shapes
