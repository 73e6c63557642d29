"""Which elements of a parameter each rank owns under ZeRO, and how ranks assemble a matrix that is split over them.

Each rank has one flat float32 vector per parameter group. ZeRO 1 and 2 concatenate the parameters of the group and cut
the result into equal partitions, one per rank. ZeRO 3 cuts each parameter into equal parts, pads the last one, and
concatenates the parts of a rank.

P elements of a rank's vector.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from moetrain.optim.muon import logical_shape
from moetrain.parallel.dispatch import exchange


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A parameter of a group. offset: index of its first element in the concatenated parameters of the group."""

    name: str
    shape: torch.Size
    offset: int

    @property
    def end(self) -> int:
        """Index of the first element after this parameter."""
        return self.offset + self.shape.numel()

    @property
    def whole(self) -> "Span":
        """The span of the whole parameter."""
        return Span(slot=self, start=0, length=self.shape.numel())


@dataclass(frozen=True, kw_only=True)
class Span:
    """`length` consecutive elements of a parameter, starting at its element `start`."""

    slot: Slot
    start: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Matrix(Span):
    """A matrix that Muon orthogonalises: a parameter, or a slice of one (an expert)."""

    rows: int
    columns: int


class Partition(Protocol):
    """How the parameters of a group are split over ranks."""

    @property
    def index(self) -> int:
        """Index of this rank among the ranks that share the group."""

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks that share the group; None if nothing is split."""

    def owners(self, span: Span) -> range:
        """Return the indices of the ranks that have a piece of `span`."""

    def piece(self, span: Span, index: int) -> tuple[int, int]:
        """Return [first, last), the elements of `span` on rank `index`, counted from the start of the span."""

    def place(self, span: Span) -> int:
        """Return where this rank's piece of `span` starts in its vector."""


@dataclass(frozen=True, kw_only=True)
class VectorPartition:
    """ZeRO 1 and 2: equal partitions of the group's vector, `size` elements per rank."""

    size: int
    index: int = 0
    process_group: dist.ProcessGroup | None = None

    def owners(self, span: Span) -> range:
        """Return the indices of the ranks that have a piece of `span`."""
        first = span.slot.offset + span.start
        return range(first // self.size, (first + span.length - 1) // self.size + 1)

    def piece(self, span: Span, index: int) -> tuple[int, int]:
        """Return [first, last), the elements of `span` on rank `index`."""
        return _overlap(span, index * self.size - span.slot.offset, size=self.size)

    def place(self, span: Span) -> int:
        """Return where this rank's piece of `span` starts in its vector."""
        return max(0, span.slot.offset + span.start - self.index * self.size)

    def used(self, slots: Sequence[Slot]) -> int:
        """Return the number of elements in this rank's vector that are not padding. slots: all slots of the group."""
        return min(max(slots[-1].end - self.index * self.size, 0), self.size)


@dataclass(frozen=True, kw_only=True)
class ParameterPartition:
    """ZeRO 3: each parameter is cut into `num_ranks` equal parts, the last one padded.

    places: by parameter name, where its part starts in a rank's vector.
    """

    num_ranks: int
    places: dict[str, int]
    index: int = 0
    process_group: dist.ProcessGroup | None = None

    @classmethod
    def of(
        cls, slots: Iterable[Slot], *, num_ranks: int, index: int = 0, process_group: dist.ProcessGroup | None = None
    ) -> "ParameterPartition":
        """Return the partition of parameters whose parts are concatenated in this order."""
        places, place = {}, 0
        for slot in slots:
            places[slot.name] = place
            place += _part(slot, num_ranks)
        return cls(num_ranks=num_ranks, places=places, index=index, process_group=process_group)

    def owners(self, span: Span) -> range:
        """Return the indices of the ranks that have a piece of `span`."""
        size = _part(span.slot, self.num_ranks)
        return range(span.start // size, (span.start + span.length - 1) // size + 1)

    def piece(self, span: Span, index: int) -> tuple[int, int]:
        """Return [first, last), the elements of `span` on rank `index`."""
        size = _part(span.slot, self.num_ranks)
        return _overlap(span, index * size, size=size)

    def place(self, span: Span) -> int:
        """Return where this rank's piece of `span` starts in its vector."""
        return self.places[span.slot.name] + max(0, span.start - self.index * _part(span.slot, self.num_ranks))


def _part(slot: Slot, num_ranks: int) -> int:
    return -(-slot.shape.numel() // num_ranks)


def _overlap(span: Span, start: int, *, size: int) -> tuple[int, int]:
    """Return the elements of `span` that are among the parameter's elements [start, start + size)."""
    first = min(max(start - span.start, 0), span.length)
    last = min(max(start + size - span.start, 0), span.length)
    return first, last


def slots_of(named: Iterable[tuple[str, torch.Tensor]]) -> list[Slot]:
    """Return the slots of tensors that are concatenated in this order."""
    slots, offset = [], 0
    for name, tensor in named:
        slots.append(Slot(name=name, shape=tensor.shape, offset=offset))
        offset = slots[-1].end
    return slots


def matrices_of(slots: Iterable[Slot]) -> list[Matrix]:
    """Return the matrices of all slots, in order of their offset."""
    matrices = []
    for slot in slots:
        num_matrices, rows, columns = logical_shape(slot.name, slot.shape)
        length = rows * columns
        for index in range(num_matrices):
            matrices.append(Matrix(slot=slot, start=index * length, length=length, rows=rows, columns=columns))
    return matrices


def own_piece(flat_P: torch.Tensor, span: Span, *, partition: Partition) -> torch.Tensor:
    """Return this rank's piece of `span` as a view of its vector; empty if it has none."""
    first, last = partition.piece(span, partition.index)
    place = partition.place(span) if last > first else 0
    return flat_P[place : place + last - first]


def whole_matrices(
    flat_P: torch.Tensor, matrices: Iterable[Matrix], *, partition: Partition
) -> dict[Matrix, torch.Tensor]:
    """Return each matrix of which this rank has a piece as a whole flat vector, with the pieces of the other ranks.

    Collective over the partition's process group.
    """
    me = partition.index
    held = [matrix for matrix in matrices if me in partition.owners(matrix)]
    own = {matrix: own_piece(flat_P, matrix, partition=partition) for matrix in held}
    if partition.process_group is None:
        return own
    num_ranks = dist.get_world_size(partition.process_group)
    shared = [[m for m in held if peer in partition.owners(m)] if peer != me else [] for peer in range(num_ranks)]
    outgoing = [own[matrix] for peer in range(num_ranks) for matrix in shared[peer]]
    lengths = [[_length(partition.piece(m, peer)) for m in shared[peer]] for peer in range(num_ranks)]
    received = exchange(
        torch.cat([flat_P.new_empty(0), *outgoing]),
        send=[sum(own[m].numel() for m in shared[peer]) for peer in range(num_ranks)],
        receive=[sum(row) for row in lengths],
        group=partition.process_group,
    )
    pieces = iter(torch.split(received, [length for row in lengths for length in row]))
    whole = {m: flat_P.new_empty(m.length) if len(partition.owners(m)) > 1 else own[m] for m in held}
    for peer in range(num_ranks):
        for matrix in shared[peer]:
            whole[matrix][slice(*partition.piece(matrix, peer))] = next(pieces)
    for matrix in held:
        if len(partition.owners(matrix)) > 1:
            whole[matrix][slice(*partition.piece(matrix, me))] = own[matrix]
    return whole


def _length(piece: tuple[int, int]) -> int:
    return piece[1] - piece[0]
