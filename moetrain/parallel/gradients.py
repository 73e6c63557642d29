"""How ZeRO 1 and 2 add up a gradient: over ranks where it lies, then once into this rank's vector.

DeepSpeed's own way copies it into a bucket, a partition, a vector and, for the norm, to float64. It has a seam for what
is done with a full bucket, one for a gradient that is a vector already, and one for the norm: all three are taken here.

P elements, of a bucket or of a rank's vector; G parameter groups.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup

from moetrain.kernels.choice import in_use
from moetrain.parallel.host_memory import sum_over
from moetrain.parallel.partition import Slot, own_piece

LARGEST_BUCKET = 1 << 20
"""Elements of small gradients that are gathered and summed over ranks at once; a larger one is summed where it lies."""
_AT_ONCE = 1 << 17  # elements squared in float64 at once: 1 MB, which stays in cache


class VectorGradients:
    """This rank's part of the gradient, one vector a parameter group: a sum over ranks and micro-batches.

    Takes the place of what a ZeRO 1 or 2 optimizer of DeepSpeed does; `groups` are those of `PartitionedOptimizer`,
    bound. A vector exists from the first sum of a step to its end.
    """

    def __init__(self, zero: Any, groups: Sequence[Mapping[str, Any]]) -> None:
        self._zero = zero
        self._groups = groups
        self._reached: list[set[str]] = [set() for _ in groups]  # parameters whose gradient is in the vector
        zero.average_tensor = self._take
        zero._use_compact_grad_partition_buffer = _always
        zero._build_compact_grad_partition_buffer = self._begin
        zero.scaled_global_norm = self._norm

    def _take(self, bucket_P: torch.Tensor, dtype: torch.dtype) -> None:
        """Sum a full bucket, or one large gradient, over ranks, and add what is this rank's to its vectors."""
        pieces: dict[dist.ProcessGroup, list[tuple[int, Slot, torch.Tensor]]] = {}
        start = 0
        for index, place, _ in self._zero.ipg_buckets[dtype].params:
            slot = self._groups[index]["slots"][place]
            values_P = bucket_P[start : start + slot.shape.numel()]
            pieces.setdefault(self._zero.real_dp_process_group[index], []).append((index, slot, values_P))
            start += len(values_P)
        for ranks, of_group in pieces.items():
            values = [values_P for _, _, values_P in of_group]
            whole_P = bucket_P if len(pieces) == 1 else torch.cat(values)
            sum_over(whole_P, ranks)
            summed = torch.split(whole_P, [len(values_P) for values_P in values])
            for (index, slot, _), summed_P in zip(of_group, summed, strict=True):
                self._add(index, slot, summed_P)

    def _add(self, index: int, slot: Slot, summed_P: torch.Tensor) -> None:
        """Add this rank's piece of a parameter's gradient to the vector of group `index`."""
        partition = self._groups[index]["partition"]
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
        """Return the norm of the whole gradient, float32: sums of squares in float64 over all that ranks hold."""
        totals = []
        for index, group in enumerate(self._groups):
            vector_P = self._zero.averaged_gradients[index].flat_partition
            for slot in group["slots"]:
                if slot.name not in self._reached[index]:
                    own_piece(vector_P, slot.whole, partition=group["partition"]).zero_()
            totals.append(sum_of_squares(vector_P))
        total_G = torch.stack(totals)  # a parameter group each
        dist.all_reduce(total_G, group=self._zero.dp_process_group)
        norm: torch.Tensor = torch.linalg.vector_norm(total_G.float().sqrt())  # rounded where DeepSpeed rounds
        return norm


def sum_of_squares(values_P: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares of a contiguous float32 vector, float64."""
    total = torch.zeros((), dtype=torch.float64, device=values_P.device)
    library = in_use()
    if library and values_P.device.type == "cpu":
        library("sum_of_squares", values_P, len(values_P), total)
        return total
    for piece_P in torch.split(values_P, _AT_ONCE):
        wide_P = piece_P.double()
        total += torch.dot(wide_P, wide_P)
    return total


def _always(index: int) -> bool:
    """Say of any group that its gradient is one vector."""
    del index
    return True
