"""How ZeRO 1 and 2 add up a gradient: over ranks where it lies, then once into this rank's vector.

DeepSpeed's own way copies it into a bucket, a partition, a vector and, for the norm, to float64. Here its methods for
a full bucket, for a gradient that is one vector already and for the norm are replaced.

P elements, of a bucket or of a rank's vector; G parameter groups.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup

from moetrain.kernels.build import Library
from moetrain.parallel.deepspeed_internals import replace_methods
from moetrain.parallel.host_memory import sum_over
from moetrain.parallel.partition import Slot, own_piece

_AT_ONCE = 1 << 17  # elements squared in float64 at once: 1 MB, which stays in cache


@dataclass(frozen=True, kw_only=True)
class _Member:
    """The gradient of a parameter, flat, and its group's index."""

    index: int
    slot: Slot
    values_P: torch.Tensor


class VectorGradients:
    """This rank's part of the gradient, one vector a parameter group: a sum over ranks and micro-batches.

    Takes the place of what a ZeRO 1 or 2 optimizer of DeepSpeed does; `groups` are those of `PartitionedOptimizer`,
    bound. A vector exists from the first sum of a step to its end.
    """

    def __init__(self, zero: Any, groups: Sequence[Mapping[str, Any]], *, library: Library | None) -> None:
        assert zero.compute_grad_norm and not zero.check_grad_overflow, "the norm must be the first to read a gradient"
        self._zero = zero
        self._groups = groups
        self._library = library
        self._reached: list[set[str]] = [set() for _ in groups]  # parameters whose gradient is in the vector
        methods: dict[str, Callable[..., Any]] = {
            "average_tensor": self._take,
            "scaled_global_norm": self._norm,
            "_use_compact_grad_partition_buffer": lambda index: True,
            "_build_compact_grad_partition_buffer": self._begin,
        }
        replace_methods(zero, methods)

    def _take(self, bucket_P: torch.Tensor, dtype: torch.dtype) -> None:
        """Sum a full bucket, or one large gradient, over ranks, and add what is this rank's to its vectors."""
        members: dict[dist.ProcessGroup, list[_Member]] = {}
        start = 0
        for index, place, _ in self._zero.ipg_buckets[dtype].params:
            slot = self._groups[index]["slots"][place]
            values_P = bucket_P[start : start + slot.shape.numel()]
            ranks = self._zero.real_dp_process_group[index]
            members.setdefault(ranks, []).append(_Member(index=index, slot=slot, values_P=values_P))
            start += len(values_P)
        for ranks, of_ranks in members.items():
            values = [member.values_P for member in of_ranks]
            whole_P = bucket_P if len(members) == 1 else torch.cat(values)
            sum_over(whole_P, ranks)
            for member, summed_P in zip(of_ranks, torch.split(whole_P, [len(v) for v in values]), strict=True):
                self._add(member, summed_P)
        for index, place, _ in self._zero.ipg_buckets[dtype].params:
            self._zero.bit16_groups[index][place].grad = None  # or a large one would live to the end of the pass

    def _add(self, member: _Member, summed_P: torch.Tensor) -> None:
        """Add this rank's piece of a parameter's gradient to the vector of its group."""
        index, slot, partition = member.index, member.slot, self._groups[member.index]["partition"]
        if self._zero.averaged_gradients.get(index) is None:
            self._zero.averaged_gradients[index] = self._begin(index)
        vector_P = self._zero.averaged_gradients[index].flat_partition
        own_P = own_piece(vector_P, slot.whole, partition=partition)
        values_P = summed_P[slice(*partition.piece(slot.whole, partition.index))]
        if slot.name in self._reached[index]:
            own_P.add_(values_P)
        else:
            own_P.copy_(values_P)
            self._reached[index].add(slot.name)

    def _begin(self, index: int) -> GradPartitionBufferGroup:
        """Return the vector of a group, to be filled; behind the last parameter it is zero."""
        self._reached[index].clear()
        vector_P = torch.empty_like(self._groups[index]["vector"])
        vector_P[self._groups[index]["partition"].used(self._groups[index]["slots"]) :] = 0.0
        return GradPartitionBufferGroup([vector_P], vector_P)

    def _norm(self) -> torch.Tensor:
        """Return the norm of the whole gradient, float32: sums of squares in float64 over all that ranks hold.

        What no micro-batch reached is zero from here on.
        """
        totals = []
        for index, group in enumerate(self._groups):
            vector_P = self._zero.averaged_gradients[index].flat_partition
            for slot in group["slots"]:
                if slot.name not in self._reached[index]:
                    own_piece(vector_P, slot.whole, partition=group["partition"]).zero_()
            totals.append(sum_of_squares(vector_P, library=self._library))
        total_G = torch.stack(totals)
        dist.all_reduce(total_G, group=self._zero.dp_process_group)
        norm: torch.Tensor = torch.linalg.vector_norm(total_G.float().sqrt())  # rounded where DeepSpeed rounds
        return norm


def sum_of_squares(values_P: torch.Tensor, *, library: Library | None) -> torch.Tensor:
    """Return the sum of squares of a contiguous float32 vector, float64."""
    total = torch.zeros((), dtype=torch.float64, device=values_P.device)
    if values_P.device.type != "cpu":
        total += torch.linalg.vector_norm(values_P, dtype=torch.float64).square()
    elif library:
        library("sum_of_squares", values_P, len(values_P), total)
    else:
        for piece_P in torch.split(values_P, _AT_ONCE):
            wide_P = piece_P.double()
            total += torch.dot(wide_P, wide_P)
    return total
