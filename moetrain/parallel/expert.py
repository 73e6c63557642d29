"""Expert parallelism in DeepSpeed 0.19: process groups, tags on parameters, and an adapter module.

DeepSpeed treats expert parameters separately only if some module is an instance of its `AutoEPMoELayer`; its groups are
those of arXiv 2201.05596. Router, dispatch, experts and checkpoints are moetrain's own, so the adapter is an instance
without a forward pass. It is the only subclass of a concrete class in this package.
"""

from collections.abc import Iterable

import deepspeed
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups
from torch import nn

from moetrain.parallel.deepspeed_internals import skip_operator_builds


def group_name(expert_size: int) -> str:
    """Return DeepSpeed's name for expert groups of `expert_size` ranks; DeepSpeed also parses it."""
    return f"ep_size_{expert_size}"


def expert_groups(expert_size: int) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """Return this rank's expert-parallel and expert-data-parallel groups; (None, None) for size 1.

    The groups are created once; an expert-parallel group consists of consecutive ranks. Collective.
    torch.distributed must be initialised.
    """
    join_deepspeed()
    if expert_size == 1:
        return None, None
    name = group_name(expert_size)
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(expert_parallel_size_=expert_size)
    return groups._get_expert_parallel_group(name), groups._get_expert_data_parallel_group(name)


def join_deepspeed() -> None:
    """Initialise DeepSpeed with the existing process group."""
    if deepspeed.comm.is_initialized():
        return
    skip_operator_builds()
    deepspeed.comm.init_distributed(dist_backend=dist.get_backend(), verbose=False)


class ExpertAdapter(AutoEPMoELayer):  # type: ignore[misc]
    """A module without parameters or forward pass that tags `experts` as expert-parallel for DeepSpeed."""

    def __init__(self, experts: Iterable[nn.Module], *, num_experts: int, expert_size: int, expert_rank: int) -> None:
        nn.Module.__init__(self)
        self.num_experts = num_experts
        self.num_local_experts = num_experts // expert_size
        self.ep_size = expert_size
        self.ep_rank = expert_rank
        self.ep_group_name = group_name(expert_size)
        self.ep_group = None
        self.folding_group_handles = None
        self.tp_group = None
        _, process_group = expert_groups(expert_size)
        for module in experts:
            for param in module.parameters():
                param.allreduce = False  # type: ignore[attr-defined]
                param.group_name = self.ep_group_name  # type: ignore[attr-defined]
                # ZeRO 3 reads these instead, and shards the experts over the ranks that store the same ones.
                param.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
                param.ds_zero_partition_group_name = self.ep_group_name  # type: ignore[attr-defined]
                param.ds_zero_partition_process_group = process_group  # type: ignore[attr-defined]
