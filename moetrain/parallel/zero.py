"""What DeepSpeed's ZeRO optimizers hold, and how weights that were changed outside a step reach it.

The one place, beside `parallel.gradients`, that reads their fields: in stages 1 and 2 a rank has all weights, and those
that it steps are a part of them; stage 3 keeps parts alone and brings weights together for the call of the module that
owns them.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import set_z3_leaf_module
from torch import nn

from moetrain.model.attention import Attention
from moetrain.model.layers import FeedForward
from moetrain.model.moe import Experts
from moetrain.model.transformer import Transformer
from moetrain.parallel.gradients import VectorGradients
from moetrain.parallel.optimizer import PartitionedOptimizer
from moetrain.parallel.partition import ParameterPartition, Partition, Slot, VectorPartition, own_piece
from moetrain.parallel.protocol import StateReader
from moetrain.parallel.state import read_into

_UNITS = (Attention, FeedForward, Experts)
"""Modules whose weights ZeRO 3 brings together at once; none of them mixes experts with what all ranks share."""


ParameterInitializer = Callable[[str], None]
"""Sets the model's parameter of this name in place."""


def hold_no_values(model: Transformer, *, device: torch.device) -> None:
    """Move a model from the meta device to `device`: a parameter keeps its shape but stores one element only.

    Buffers are set to zero.
    """
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(1, device=device).expand(param.shape)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros_like(buffer, device=device))


class _SetOneByOne(nn.Module):
    """What `zero.Init` iterates over: it partitions a parameter before it asks for the next one."""

    def __init__(self, model: Transformer, initialize_parameter: ParameterInitializer, *, device: torch.device) -> None:
        super().__init__()
        self.model = model
        self.initialize_parameter = initialize_parameter
        self.device = device

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yield each parameter with its initial values."""
        for name, param in self.model.named_parameters(recurse=recurse):
            param.data = torch.empty(param.shape, device=self.device)
            self.initialize_parameter(name)
            yield param


def partition_one_by_one(
    model: Transformer, initialize_parameter: ParameterInitializer, *, device: torch.device, config: Mapping[str, Any]
) -> None:
    """Set and partition one parameter after another: a rank holds its shards and one whole parameter, never the model.

    model: made by `hold_no_values`, its experts marked by `ExpertAdapter`. config: DeepSpeed's. Collective.
    """
    deepspeed.zero.Init(
        module=_SetOneByOne(model, initialize_parameter, device=device),
        config_dict_or_path=dict(config),
        dtype=torch.float32,
    )


def mark_units(model: Transformer) -> None:
    """Tell ZeRO 3 which modules to treat as one; call before DeepSpeed takes the model."""
    for module in model.modules():
        if isinstance(module, _UNITS):
            set_z3_leaf_module(module, True)


def stage_3_settings(model: Transformer) -> dict[str, Any]:
    """Return what DeepSpeed is told of stage 3.

    One sub-group a parameter group. Nothing is fetched ahead: weights of two process groups would be fetched in an
    order that differs between ranks. Weights leave memory after each use, but for the gains of the norms.
    """
    return {
        "sub_group_size": 1 << 60,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_param_persistence_threshold": max(p.numel() for p in model.parameters() if p.ndim == 1),
    }


class Shards(Protocol):
    """A rank's parts of masters and weights, by parameter group."""

    loss_factor: int
    """What to multiply a loss by: the number of ranks where DeepSpeed divides the sum of their gradients by it."""

    def vectors(self) -> Iterator[torch.Tensor]:
        """Yield each group's float32 masters of this rank, one flat vector a group."""

    def partitions(self) -> Iterator[Partition]:
        """Yield how each group is cut; checks that DeepSpeed laid the parameters as expected."""

    def read(self, slot: Slot, reader: StateReader, *, group: Mapping[str, Any], first: int) -> None:
        """Fill what this rank holds of a parameter, which begins at element `first` of the global tensor."""

    def multiply_rows(self, factors: Mapping[str, torch.Tensor]) -> None:
        """Multiply rows of masters and weights; see `Engine.multiply_rows`."""

    def written(self) -> None:
        """Make masters and weights agree after `read`."""

    def discarded(self) -> None:
        """Clear what is left of a gradient that was made infinite to be dropped."""


class VectorShards:
    """ZeRO 1 and 2."""

    def __init__(self, zero: Any, model: Transformer, *, optimizer: PartitionedOptimizer) -> None:
        self.loss_factor = 1
        self.zero = zero
        self.model = model
        self.optimizer = optimizer
        self.gradients = VectorGradients(zero, optimizer.param_groups, library=optimizer.library)
        self._share_masters()

    def _share_masters(self) -> None:
        """Make a rank's masters its part of the weights: both are float32, DeepSpeed's second copy is dropped."""
        for index, flat_P in enumerate(self.vectors()):
            rank = dist.get_rank(self.zero.real_dp_process_group[index])
            flat_P.data = self.zero.parallel_partitioned_bit16_groups[index][rank].data
        self.zero._link_all_hp_params()  # views that would hold the memory of the copy

    def vectors(self) -> Iterator[torch.Tensor]:
        """Yield the masters of each group."""
        for group in self.optimizer.param_groups:
            (flat_P,) = group["params"]
            yield flat_P

    def partitions(self) -> Iterator[Partition]:
        """Yield how each group is cut."""
        params = dict(self.model.named_parameters())
        for index, group in enumerate(self.optimizer.param_groups):
            flat = self.zero.bit16_groups_flat[index]
            for slot in group["slots"]:
                offset = (params[slot.name].data_ptr() - flat.data_ptr()) // flat.element_size()
                assert offset == slot.offset, f"DeepSpeed laid {slot.name} at {offset}, not at {slot.offset}"
            process_group = self.zero.real_dp_process_group[index]
            num_ranks = dist.get_world_size(process_group)
            (flat_P,) = group["params"]
            assert flat_P.numel() * num_ranks == flat.numel()
            yield VectorPartition(
                size=flat_P.numel(),
                index=dist.get_rank(process_group),
                process_group=process_group if num_ranks > 1 else None,
            )

    def read(self, slot: Slot, reader: StateReader, *, group: Mapping[str, Any], first: int) -> None:
        """Fill the whole of a parameter."""
        del group
        read_into(self.model.get_parameter(slot.name).data, reader, name=slot.name, first=first)

    def multiply_rows(self, factors: Mapping[str, torch.Tensor]) -> None:
        """Multiply all weights, of which the masters are a part: nothing travels."""
        for name, factor_M in factors.items():
            param = self.model.get_parameter(name)
            param.data.mul_(factor_M.to(param.device)[:, None])

    def written(self) -> None:
        """Do nothing: the masters are a part of what was read."""

    def discarded(self) -> None:
        """Do nothing: DeepSpeed drops the whole of it."""


class ParameterShards:
    """ZeRO 3. Padding of the last rank's parts is set to zero, which it stays: its gradient is zero."""

    def __init__(self, zero: Any, model: Transformer, *, optimizer: PartitionedOptimizer) -> None:
        self.loss_factor = dist.get_world_size()
        self.zero = zero
        self.optimizer = optimizer
        self.names = {id(param): name for name, param in model.named_parameters()}
        for flat_P, partition, group in zip(self.vectors(), self.partitions(), optimizer.param_groups, strict=True):
            kept_P = torch.zeros_like(flat_P, dtype=torch.bool)
            for slot in group["slots"]:
                own_piece(kept_P, slot.whole, partition=partition).fill_(True)
            flat_P.data.masked_fill_(~kept_P, 0.0)
        self.written()
        self._share_masters()

    def _share_masters(self) -> None:
        """Make the masters the parts that are gathered: both are float32, so DeepSpeed's second copy is dropped."""
        for index, flat_P in enumerate(self.vectors()):
            flat_P.data = self.zero.fp16_partitioned_groups_flat[index].data

    def vectors(self) -> Iterator[torch.Tensor]:
        """Yield the masters of each group."""
        yield from self.zero.fp32_partitioned_groups_flat

    def partitions(self) -> Iterator[Partition]:
        """Yield how each group is cut."""
        groups = zip(self.zero.fp16_groups, self.optimizer.param_groups, strict=True)
        for index, (params, group) in enumerate(groups):
            assert self.zero.sub_group_to_group_id[index] == index, "DeepSpeed made several sub-groups of a group"
            process_group = self.zero.sub_group_process_groups[index]
            num_ranks = dist.get_world_size(process_group)
            partition = ParameterPartition.of(
                group["slots"],
                num_ranks=num_ranks,
                index=dist.get_rank(process_group),
                process_group=process_group if num_ranks > 1 else None,
            )
            for param, slot in zip(params, group["slots"], strict=True):
                found = (self.names[id(param)], param.ds_shape, self.zero.grad_position[self.zero.get_param_id(param)])
                expected = (slot.name, slot.shape, [index, partition.places[slot.name], param.partition_numel()])
                assert found == expected, f"DeepSpeed laid {found}, not {expected}"
            yield partition

    def read(self, slot: Slot, reader: StateReader, *, group: Mapping[str, Any], first: int) -> None:
        """Fill this rank's part of a parameter."""
        start, _ = group["partition"].piece(slot.whole, group["partition"].index)
        read_into(self.optimizer.weight_piece(group, slot).data, reader, name=slot.name, first=first + start)

    def multiply_rows(self, factors: Mapping[str, torch.Tensor]) -> None:
        """Multiply the elements that this rank holds."""
        self.optimizer.multiply_rows(factors)
        self.written()

    def discarded(self) -> None:
        """Clear the padding too, which no later gradient overwrites."""
        self.zero.grad_partitions_flat_buffer.zero_()

    def written(self) -> None:
        """Drop what was gathered before. The first call also copies the masters to the parts that are gathered."""
        self.zero.parameter_offload.partition_all_parameters()
        for index, flat_P in enumerate(self.vectors()):
            self.zero.fp16_partitioned_groups_flat[index].data.copy_(flat_P.data)
