"""Which elements of which parameter a rank owns under ZeRO, and how a matrix that is cut becomes whole.

DeepSpeed gives each rank one flat float32 vector a parameter group. ZeRO 1 and 2 lay the parameters of the group end to
end and cut the whole vector into one equal partition a rank; ZeRO 3 cuts each parameter on its own into equal
parts, the last padded, and lays the parts of a rank end to end.

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
    """A parameter of a group: `offset` is its first element when the group's parameters are laid end to end."""

    name: str
    shape: torch.Size
    offset: int

    @property
    def end(self) -> int:
        """First element after it."""
        return self.offset + self.shape.numel()

    @property
    def whole(self) -> "Span":
        """All of it."""
        return Span(slot=self, start=0, length=self.shape.numel())


@dataclass(frozen=True, kw_only=True)
class Span:
    """`length` consecutive elements of a parameter, from its element `start` on."""

    slot: Slot
    start: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Matrix(Span):
    """A matrix that Muon treats as one."""

    rows: int
    columns: int


class Partition(Protocol):
    """How the parameters of a group are cut. `index`: this rank's among those that share the group."""

    @property
    def index(self) -> int:
        """This rank's place among the ranks that share the group."""

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks that share the group; None where nothing is cut."""

    def owners(self, span: Span) -> range:
        """Return the indices of the ranks that hold a piece of `span`."""

    def piece(self, span: Span, index: int) -> tuple[int, int]:
        """Return the elements [first, last) of `span`, counted from its own start, that rank `index` holds."""

    def place(self, span: Span) -> int:
        """Return where this rank's piece of `span` begins in this rank's vector."""


@dataclass(frozen=True, kw_only=True)
class VectorPartition:
    """ZeRO 1 and 2: equal cuts of the group's vector, `size` elements a rank."""

    size: int
    index: int = 0
    process_group: dist.ProcessGroup | None = None

    def owners(self, span: Span) -> range:
        """Return the indices of the ranks that hold a piece of `span`."""
        first = span.slot.offset + span.start
        return range(first // self.size, (first + span.length - 1) // self.size + 1)

    def piece(self, span: Span, index: int) -> tuple[int, int]:
        """Return the elements [first, last) of `span` that rank `index` holds."""
        return _overlap(span, index * self.size - span.slot.offset, size=self.size)

    def place(self, span: Span) -> int:
        """Return where this rank's piece of `span` begins in this rank's vector."""
        return max(0, span.slot.offset + span.start - self.index * self.size)

    def used(self, slots: Sequence[Slot]) -> int:
        """Return how many elements of this rank's vector `slots`, all of the group's, fill; the rest is padding."""
        return min(max(slots[-1].end - self.index * self.size, 0), self.size)


@dataclass(frozen=True, kw_only=True)
class ParameterPartition:
    """ZeRO 3: each parameter cut into `num_ranks` equal parts, the last padded; `places` by the parameter's name."""

    num_ranks: int
    places: dict[str, int]
    index: int = 0
    process_group: dist.ProcessGroup | None = None

    @classmethod
    def of(
        cls, slots: Iterable[Slot], *, num_ranks: int, index: int = 0, process_group: dist.ProcessGroup | None = None
    ) -> "ParameterPartition":
        """Return the partition of parameters whose parts lie end to end in this order."""
        places, place = {}, 0
        for slot in slots:
            places[slot.name] = place
            place += _part(slot, num_ranks)
        return cls(num_ranks=num_ranks, places=places, index=index, process_group=process_group)

    def owners(self, span: Span) -> range:
        """Return the indices of the ranks that hold a piece of `span`."""
        size = _part(span.slot, self.num_ranks)
        return range(span.start // size, (span.start + span.length - 1) // size + 1)

    def piece(self, span: Span, index: int) -> tuple[int, int]:
        """Return the elements [first, last) of `span` that rank `index` holds."""
        size = _part(span.slot, self.num_ranks)
        return _overlap(span, index * size, size=size)

    def place(self, span: Span) -> int:
        """Return where this rank's piece of `span` begins in this rank's vector."""
        return self.places[span.slot.name] + max(0, span.start - self.index * _part(span.slot, self.num_ranks))


def _part(slot: Slot, num_ranks: int) -> int:
    return -(-slot.shape.numel() // num_ranks)


def _overlap(span: Span, start: int, *, size: int) -> tuple[int, int]:
    """Return the elements of `span` that lie in the parameter's elements [start, start + size)."""
    first = min(max(start - span.start, 0), span.length)
    last = min(max(start + size - span.start, 0), span.length)
    return first, last


def slots_of(named: Iterable[tuple[str, torch.Tensor]]) -> list[Slot]:
    """Return the slots of tensors laid end to end."""
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
    """Return this rank's piece of `span` as a view of its vector; empty where it holds none."""
    first, last = partition.piece(span, partition.index)
    place = partition.place(span) if last > first else 0
    return flat_P[place : place + last - first]


def whole_matrices(
    flat_P: torch.Tensor, matrices: Iterable[Matrix], *, partition: Partition
) -> dict[Matrix, torch.Tensor]:
    """Return, as flat vectors, the matrices that this rank holds a piece of, completed with the pieces of the others.

    Collective over the partition's process group when some matrix is cut.
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
