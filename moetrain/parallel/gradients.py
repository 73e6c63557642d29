"""Gradient reduction of ZeRO 1 and 2: sum over ranks in place, then add once to this rank's flat vector.

DeepSpeed would copy a gradient into a bucket, a partition and a vector, and convert it to float64 for the norm. This
module replaces four of its methods to avoid these copies.

P elements of a bucket or of a rank's vector; G parameter groups.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup

from moetrain.kernels.build import Library
from moetrain.parallel.deepspeed_internals import replace_methods
from moetrain.parallel.host_memory import all_reduce_in_place
from moetrain.parallel.partition import Slot, own_piece

_CHUNK_ELEMENTS = 1 << 17  # converted to float64 at once: 1 MB, which stays in cache


@dataclass(frozen=True, kw_only=True)
class _Gradient:
    """The flat gradient of a parameter. index: its parameter group."""

    index: int
    slot: Slot
    values_P: torch.Tensor


class VectorGradients:
    """This rank's part of the gradient, summed over ranks and micro-batches: one flat vector per parameter group.

    Replaces methods of DeepSpeed's ZeRO 1 and 2 optimizer `zero`. `groups` are the parameter groups of
    `PartitionedOptimizer`; its `bind` must be called before the first step. The vectors exist from the first reduction
    of a step to the end of the step.
    """

    def __init__(self, zero: Any, groups: Sequence[Mapping[str, Any]], *, library: Library | None) -> None:
        assert zero.compute_grad_norm and not zero.check_grad_overflow, "the norm must be the first to read a gradient"
        self._zero = zero
        self._groups = groups
        self._library = library
        self._filled: list[set[str]] = [set() for _ in groups]  # parameters whose part of the vector is set
        methods: dict[str, Callable[..., Any]] = {
            "average_tensor": self._reduce_bucket,
            "scaled_global_norm": self._gradient_norm,
            "_use_compact_grad_partition_buffer": lambda index: True,
            "_build_compact_grad_partition_buffer": self._new_vector,
        }
        replace_methods(zero, methods)

    def _reduce_bucket(self, bucket_P: torch.Tensor, dtype: torch.dtype) -> None:
        """Sum a full bucket, or one large gradient, over ranks; add this rank's part to its vectors."""
        by_ranks: dict[dist.ProcessGroup, list[_Gradient]] = {}
        start = 0
        for index, position, _ in self._zero.ipg_buckets[dtype].params:
            slot = self._groups[index]["slots"][position]
            values_P = bucket_P[start : start + slot.shape.numel()]
            ranks = self._zero.real_dp_process_group[index]
            by_ranks.setdefault(ranks, []).append(_Gradient(index=index, slot=slot, values_P=values_P))
            start += len(values_P)
        for ranks, gradients in by_ranks.items():
            values = [gradient.values_P for gradient in gradients]
            whole_P = bucket_P if len(by_ranks) == 1 else torch.cat(values)
            all_reduce_in_place(whole_P, ranks)
            for gradient, summed_P in zip(gradients, torch.split(whole_P, [len(v) for v in values]), strict=True):
                self._add(gradient, summed_P)
        for index, position, _ in self._zero.ipg_buckets[dtype].params:
            self._zero.bit16_groups[index][position].grad = None  # frees large gradients before the backward pass ends

    def _add(self, gradient: _Gradient, summed_P: torch.Tensor) -> None:
        """Add this rank's piece of a parameter's gradient to the vector of its group."""
        index, slot, partition = gradient.index, gradient.slot, self._groups[gradient.index]["partition"]
        if self._zero.averaged_gradients.get(index) is None:
            self._zero.averaged_gradients[index] = self._new_vector(index)
        vector_P = self._zero.averaged_gradients[index].flat_partition
        own_P = own_piece(vector_P, slot.whole, partition=partition)
        values_P = summed_P[slice(*partition.piece(slot.whole, partition.index))]
        if slot.name in self._filled[index]:
            own_P.add_(values_P)
        else:
            own_P.copy_(values_P)
            self._filled[index].add(slot.name)

    def _new_vector(self, index: int) -> GradPartitionBufferGroup:
        """Return a new vector for a group, uninitialised except for the padding at its end, which is zero."""
        self._filled[index].clear()
        vector_P = torch.empty_like(self._groups[index]["vector"])
        vector_P[self._groups[index]["partition"].used(self._groups[index]["slots"]) :] = 0.0
        return GradPartitionBufferGroup([vector_P], vector_P)

    def _gradient_norm(self) -> torch.Tensor:
        """Return the float32 norm of the whole gradient, from sums of squares in float64 over all ranks.

        Parameters that received no gradient in this step are set to zero in the vectors first.
        """
        totals = []
        for index, group in enumerate(self._groups):
            vector_P = self._zero.averaged_gradients[index].flat_partition
            for slot in group["slots"]:
                if slot.name not in self._filled[index]:
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
        for piece_P in torch.split(values_P, _CHUNK_ELEMENTS):
            wide_P = piece_P.double()
            total += torch.dot(wide_P, wide_P)
    return total
