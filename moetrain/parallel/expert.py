"""The one place that knows how DeepSpeed 0.19 recognises experts: groups, tags, and the adapter that switches them on.

DeepSpeed handles experts apart only when some module is an instance of its own `AutoEPMoELayer` (arXiv 2201.05596 for
the groups). Router, dispatch, experts and checkpoints are ours, so the adapter is such a module without any forward:
the exception to the rule that nothing concrete is subclassed.
"""

from collections.abc import Iterable

import deepspeed
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups
from torch import nn

from moetrain.parallel.deepspeed_internals import skip_operator_builds


def group_name(expert_size: int) -> str:
    """Return the name that DeepSpeed gives, and parses, for groups of `expert_size` ranks."""
    return f"ep_size_{expert_size}"


def expert_groups(expert_size: int) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """Return the expert-parallel and the expert-data-parallel group of this rank, made once; None, None for size 1.

    Expert-parallel groups are consecutive ranks. torch.distributed must be initialised. Collective.
    """
    join_deepspeed()
    if expert_size == 1:
        return None, None
    name = group_name(expert_size)
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(expert_parallel_size_=expert_size)
    return groups._get_expert_parallel_group(name), groups._get_expert_data_parallel_group(name)


def join_deepspeed() -> None:
    """Let DeepSpeed use the process group that exists."""
    if deepspeed.comm.is_initialized():
        return
    skip_operator_builds()
    deepspeed.comm.init_distributed(dist_backend=dist.get_backend(), verbose=False)


class ExpertAdapter(AutoEPMoELayer):  # type: ignore[misc]
    """A module without parameters or forward that makes DeepSpeed see the experts it is given as split over ranks."""

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
                # What ZeRO 3 asks for instead: it cuts these over the ranks that hold the same experts.
                param.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
                param.ds_zero_partition_group_name = self.ep_group_name  # type: ignore[attr-defined]
                param.ds_zero_partition_process_group = process_group  # type: ignore[attr-defined]
