"""Access to the weights and masters inside DeepSpeed's ZeRO optimizers.

Only this module and `parallel.gradients` read the fields of those optimizers. In stages 1 and 2 each rank stores all
weights and updates a part of them. In stage 3 each rank stores its shards only; DeepSpeed gathers the weights of a
module for each call.
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
"""Modules whose weights ZeRO 3 gathers together. In each, either all weights are experts' or none is."""


ParameterInitializer = Callable[[str], None]
"""Sets the model's parameter of this name in place."""


def allocate_placeholders(model: Transformer, *, device: torch.device) -> None:
    """Move a model from the meta device to `device` without allocating its weights.

    Each parameter becomes one element, expanded to the parameter's shape. Buffers are set to zero.
    """
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(1, device=device).expand(param.shape)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype, device=device))


class _ParameterSource(nn.Module):
    """Allocates and initialises parameters one at a time for `zero.Init`, which partitions each before the next."""

    def __init__(self, model: Transformer, initialize_parameter: ParameterInitializer, *, device: torch.device) -> None:
        super().__init__()
        self.model = model
        self.initialize_parameter = initialize_parameter
        self.device = device

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yield each parameter after its values are set."""
        for name, param in self.model.named_parameters(recurse=recurse):
            param.data = torch.empty(param.shape, device=self.device)
            self.initialize_parameter(name)
            yield param


def initialize_and_partition(
    model: Transformer, initialize_parameter: ParameterInitializer, *, device: torch.device, config: Mapping[str, Any]
) -> None:
    """Initialise and partition one parameter at a time: a rank stores at most its shards and one whole parameter.

    model: from `allocate_placeholders`, its experts tagged by `ExpertAdapter`. config: DeepSpeed's. Collective.
    """
    deepspeed.zero.Init(
        module=_ParameterSource(model, initialize_parameter, device=device),
        config_dict_or_path=dict(config),
        dtype=torch.float32,
    )


def mark_gather_units(model: Transformer) -> None:
    """Mark the modules that ZeRO 3 gathers as a whole. Must be called before `deepspeed.initialize`."""
    for module in model.modules():
        if isinstance(module, _UNITS):
            set_z3_leaf_module(module, True)


def stage_3_config(model: Transformer) -> dict[str, Any]:
    """Return the stage 3 entries of DeepSpeed's config.

    Each parameter group has one sub-group. Prefetching is off, because ranks would prefetch the weights of two process
    groups in different orders. Weights are released after each use; the norm gains stay gathered.
    """
    return {
        "sub_group_size": 1 << 60,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_param_persistence_threshold": max(p.numel() for p in model.parameters() if p.ndim == 1),
    }


class Shards(Protocol):
    """This rank's parts of masters and weights, by parameter group."""

    loss_factor: int
    """Factor for the loss: the number of ranks if DeepSpeed averages gradients, 1 if it sums them."""

    def vectors(self) -> Iterator[torch.Tensor]:
        """Yield this rank's float32 masters: one flat vector per group."""

    def partitions(self) -> Iterator[Partition]:
        """Yield the partition of each group; asserts that DeepSpeed placed the parameters as expected."""

    def read(self, slot: Slot, reader: StateReader, *, group: Mapping[str, Any], first: int) -> None:
        """Fill this rank's part of a parameter from `reader`.

        first: element of the flattened global tensor at which this rank's (expert) parameter starts.
        """

    def multiply_rows(self, factors: Mapping[str, torch.Tensor]) -> None:
        """Multiply rows of masters and weights; see `Engine.multiply_rows`."""

    def after_load(self) -> None:
        """Make masters and weights equal; must be called after `read`."""

    def clear_discarded(self) -> None:
        """Clear gradient buffers that DeepSpeed leaves set when it skips a step."""


class VectorShards:
    """`Shards` of ZeRO 1 and 2."""

    def __init__(self, zero: Any, model: Transformer, *, optimizer: PartitionedOptimizer) -> None:
        self.loss_factor = 1
        self.zero = zero
        self.model = model
        self.optimizer = optimizer
        self.gradients = VectorGradients(zero, optimizer.param_groups, library=optimizer.library)
        self._share_masters()

    def _share_masters(self) -> None:
        """Make the masters a view of this rank's part of the weights; both are float32, so a copy is not needed."""
        for index, flat_P in enumerate(self.vectors()):
            rank = dist.get_rank(self.zero.real_dp_process_group[index])
            flat_P.data = self.zero.parallel_partitioned_bit16_groups[index][rank].data
        self.zero._link_all_hp_params()  # replaces views that would keep the copy in memory

    def vectors(self) -> Iterator[torch.Tensor]:
        """Yield the masters of each group."""
        for group in self.optimizer.param_groups:
            (flat_P,) = group["params"]
            yield flat_P

    def partitions(self) -> Iterator[Partition]:
        """Yield the partition of each group."""
        params = dict(self.model.named_parameters())
        for index, group in enumerate(self.optimizer.param_groups):
            flat = self.zero.bit16_groups_flat[index]
            for slot in group["slots"]:
                offset = (params[slot.name].data_ptr() - flat.data_ptr()) // flat.element_size()
                assert offset == slot.offset, f"DeepSpeed placed {slot.name} at {offset}, not at {slot.offset}"
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
        """Fill the whole parameter."""
        del group
        read_into(self.model.get_parameter(slot.name).data, reader, name=slot.name, first=first)

    def multiply_rows(self, factors: Mapping[str, torch.Tensor]) -> None:
        """Multiply all weights on this rank, including its masters, which are views of them."""
        for name, factor_M in factors.items():
            param = self.model.get_parameter(name)
            param.data.mul_(factor_M.to(param.device)[:, None])

    def after_load(self) -> None:
        """Do nothing: the masters are views of the weights."""

    def clear_discarded(self) -> None:
        """Do nothing: DeepSpeed drops the whole gradient."""


class ParameterShards:
    """`Shards` of ZeRO 3. The padding of the last rank's parts is zero and stays zero, as its gradient is zero."""

    def __init__(self, zero: Any, model: Transformer, *, optimizer: PartitionedOptimizer) -> None:
        self.loss_factor = dist.get_world_size()
        self.zero = zero
        self.optimizer = optimizer
        self.names = {id(param): name for name, param in model.named_parameters()}
        for flat_P, partition, group in zip(self.vectors(), self.partitions(), optimizer.param_groups, strict=True):
            is_owned_P = torch.zeros_like(flat_P, dtype=torch.bool)
            for slot in group["slots"]:
                own_piece(is_owned_P, slot.whole, partition=partition).fill_(True)
            flat_P.data.masked_fill_(~is_owned_P, 0.0)
        self.after_load()
        self._share_masters()

    def _share_masters(self) -> None:
        """Make the masters views of the shards that are gathered; both are float32, so a copy is not needed."""
        for index, flat_P in enumerate(self.vectors()):
            flat_P.data = self.zero.fp16_partitioned_groups_flat[index].data

    def vectors(self) -> Iterator[torch.Tensor]:
        """Yield the masters of each group."""
        yield from self.zero.fp32_partitioned_groups_flat

    def partitions(self) -> Iterator[Partition]:
        """Yield the partition of each group."""
        groups = zip(self.zero.fp16_groups, self.optimizer.param_groups, strict=True)
        for index, (params, group) in enumerate(groups):
            assert self.zero.sub_group_to_group_id[index] == index, (
                "DeepSpeed split a parameter group into several sub-groups"
            )
            process_group = self.zero.sub_group_process_groups[index]
            num_ranks = dist.get_world_size(process_group)
            partition = ParameterPartition.of(
                group["slots"],
                num_ranks=num_ranks,
                index=dist.get_rank(process_group),
                process_group=process_group if num_ranks > 1 else None,
            )
            for param, slot in zip(params, group["slots"], strict=True):
                actual = (self.names[id(param)], param.ds_shape, self.zero.grad_position[self.zero.get_param_id(param)])
                expected = (slot.name, slot.shape, [index, partition.places[slot.name], param.partition_numel()])
                assert actual == expected, f"DeepSpeed placed {actual}, expected {expected}"
            yield partition

    def read(self, slot: Slot, reader: StateReader, *, group: Mapping[str, Any], first: int) -> None:
        """Fill this rank's shard of a parameter."""
        start, _ = group["partition"].piece(slot.whole, group["partition"].index)
        read_into(self.optimizer.weight_piece(group, slot).data, reader, name=slot.name, first=first + start)

    def multiply_rows(self, factors: Mapping[str, torch.Tensor]) -> None:
        """Multiply the elements on this rank."""
        self.optimizer.multiply_rows(factors)
        self.after_load()

    def clear_discarded(self) -> None:
        """Set the gradient buffer to zero, including its padding, which later gradients do not overwrite."""
        self.zero.grad_partitions_flat_buffer.zero_()

    def after_load(self) -> None:
        """Release gathered weights and copy masters to shards; after the first call both are the same memory."""
        self.zero.parameter_offload.partition_all_parameters()
        for index, flat_P in enumerate(self.vectors()):
            self.zero.fp16_partitioned_groups_flat[index].data.copy_(flat_P.data)
