"""Who owns and gathers what: Muon and AdamW on the flat float32 partitions of ZeRO 1 and 2.

DeepSpeed lays the parameters of a group end to end, cuts the vector into one equal partition a rank, and hands the
optimizer its partition. AdamW and momentum go element by element. A matrix that a cut runs through is orthogonalised by
each rank that holds a piece of it, after those ranks have sent one another their pieces (Moonlight's Algorithm 1,
arXiv 2502.16982, without gathering what nobody needs); each keeps its own slice of the result.

B matrices of one shape, M rows, N columns; P elements of a partition.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from moetrain.optim.adamw import adamw_update
from moetrain.optim.config import OptimConfig, OptimizerName
from moetrain.optim.muon import apply_update, logical_shape, nesterov, orthogonal_update
from moetrain.parallel.dispatch import exchange
from moetrain.parallel.state import STATE_NAMES

_BATCH_ELEMENTS = 1 << 26  # matrices orthogonalised at once: 256 MB in float32, and a few times that in intermediates


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where a parameter lies in the flat vector of its group: `offset`, in elements."""

    name: str
    shape: torch.Size
    offset: int

    @property
    def end(self) -> int:
        """First element after it."""
        return self.offset + self.shape.numel()


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A matrix that Muon treats as one, in the flat vector of its group."""

    offset: int
    rows: int
    columns: int

    @property
    def end(self) -> int:
        """First element after it."""
        return self.offset + self.rows * self.columns


@dataclass(frozen=True, kw_only=True)
class Partition:
    """The equal cuts of a group's flat vector: this rank holds elements [start, stop). `process_group` None: no cut."""

    size: int
    index: int = 0
    process_group: dist.ProcessGroup | None = None

    @property
    def start(self) -> int:
        """First element of this rank."""
        return self.index * self.size

    @property
    def stop(self) -> int:
        """First element after this rank's."""
        return self.start + self.size

    def owners(self, item: Slot | Matrix) -> range:
        """Return the indices of the ranks that hold a piece of `item`."""
        return range(item.offset // self.size, (item.end - 1) // self.size + 1)

    def piece(self, item: Slot | Matrix, index: int) -> tuple[int, int]:
        """Return the elements [first, last) of `item`, counted from its own start, that rank `index` holds."""
        first = max(item.offset, index * self.size) - item.offset
        last = min(item.end, (index + 1) * self.size) - item.offset
        return first, max(first, last)


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
        for index in range(num_matrices):
            matrices.append(Matrix(offset=slot.offset + index * rows * columns, rows=rows, columns=columns))
    return matrices


def whole_matrices(
    flat_P: torch.Tensor, matrices: Iterable[Matrix], *, partition: Partition
) -> dict[Matrix, torch.Tensor]:
    """Return, as flat vectors, the matrices that this rank holds a piece of, completed with the pieces of the others.

    Collective over the partition's process group when some matrix is cut.
    """
    me = partition.index
    held = [matrix for matrix in matrices if me in partition.owners(matrix)]
    own = {matrix: _local(flat_P, matrix, partition=partition) for matrix in held}
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
    whole = {m: flat_P.new_empty(m.rows * m.columns) if len(partition.owners(m)) > 1 else own[m] for m in held}
    for peer in range(num_ranks):
        for matrix in shared[peer]:
            whole[matrix][slice(*partition.piece(matrix, peer))] = next(pieces)
    for matrix in held:
        if len(partition.owners(matrix)) > 1:
            whole[matrix][slice(*partition.piece(matrix, me))] = own[matrix]
    return whole


def _length(piece: tuple[int, int]) -> int:
    return piece[1] - piece[0]


def _local(flat_P: torch.Tensor, item: Slot | Matrix, *, partition: Partition) -> torch.Tensor:
    """Return this rank's piece of `item` as a view of its partition."""
    first, last = partition.piece(item, partition.index)
    start = item.offset - partition.start
    return flat_P[start + first : start + last]


class PartitionedOptimizer(torch.optim.Optimizer):
    """Muon and AdamW for DeepSpeed: one flat partition a parameter group, after `bind`.

    A group holds `rule`, `slots`, and DeepSpeed's own `moe` and `name`. DeepSpeed steps one group at a time, with the
    clipped gradient in the partition's `.grad`.
    """

    def __init__(self, groups: list[dict[str, Any]], *, config: OptimConfig, dtype: torch.dtype) -> None:
        super().__init__(groups, defaults={"lr": config.lr, "step": 0, "partition": None})
        self.config = config
        self.dtype = dtype

    def bind(self, partitions: Iterable[Partition]) -> None:
        """Tell each group how its flat vector is cut, and make its state: zeros."""
        for group, partition in zip(self.param_groups, partitions, strict=True):
            (flat_P,) = group["params"]
            group["partition"] = partition
            group["matrices"] = matrices_of(group["slots"]) if group["rule"] == OptimizerName.muon else []
            for name in STATE_NAMES[group["rule"]]:
                self.state[flat_P][name] = torch.zeros_like(flat_P)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the partition of every group that is in `param_groups` now."""
        del closure  # part of torch's signature
        for group in self.param_groups:
            (flat_P,) = group["params"]
            group["step"] += 1
            if group["rule"] == OptimizerName.muon:
                self._step_muon(flat_P, group)
            else:
                adamw_update(
                    flat_P,
                    flat_P.grad,
                    **self.state[flat_P],
                    step=group["step"],
                    learning_rate=group["lr"],
                    betas=self.config.betas,
                    eps=self.config.eps,
                    weight_decay=self.config.weight_decay,
                )

    def _step_muon(self, flat_P: torch.Tensor, group: Mapping[str, Any]) -> None:
        partition = group["partition"]
        assert flat_P.grad is not None
        direction_P = nesterov(flat_P.grad, self.state[flat_P]["momentum"], decay=self.config.momentum)
        whole = whole_matrices(direction_P, group["matrices"], partition=partition)
        by_shape: dict[tuple[int, int], list[Matrix]] = defaultdict(list)
        for matrix in whole:
            by_shape[matrix.rows, matrix.columns].append(matrix)
        update_P = torch.zeros_like(flat_P)
        for (rows, columns), matrices in by_shape.items():
            batch = max(1, _BATCH_ELEMENTS // (rows * columns))
            for chunk in (matrices[start : start + batch] for start in range(0, len(matrices), batch)):
                direction_BMN = torch.stack([whole[matrix].view(rows, columns) for matrix in chunk])
                update_BMN = orthogonal_update(direction_BMN, schedule=self.config.newton_schulz, dtype=self.dtype)
                for matrix, update_MN in zip(chunk, update_BMN, strict=True):
                    mine = slice(*partition.piece(matrix, partition.index))
                    _local(update_P, matrix, partition=partition).copy_(update_MN.reshape(-1)[mine])
        apply_update(flat_P, update_P, learning_rate=group["lr"], weight_decay=self.config.weight_decay)

    @torch.no_grad()
    def multiply_rows(self, factors: Mapping[str, torch.Tensor]) -> None:
        """Multiply, in this rank's pieces of the masters, row i of the parameter `name` by `factors[name][i]`."""
        for group in self.param_groups:
            (flat_P,) = group["params"]
            partition = group["partition"]
            for slot in group["slots"]:
                if slot.name not in factors:
                    continue
                factor_M = factors[slot.name].to(flat_P.device)
                num_rows, num_columns = slot.shape
                assert factor_M.shape == (num_rows,)
                mine = slice(*partition.piece(slot, partition.index))
                by_element = factor_M[:, None].expand(num_rows, num_columns).reshape(-1)[mine]
                _local(flat_P, slot, partition=partition).mul_(by_element)

    def state_piece(self, group: Mapping[str, Any], slot: Slot, *, name: str) -> torch.Tensor:
        """Return this rank's piece of a parameter's state `name`, as a view."""
        (flat_P,) = group["params"]
        return _local(self.state[flat_P][name], slot, partition=group["partition"])

    def weight_piece(self, group: Mapping[str, Any], slot: Slot) -> torch.Tensor:
        """Return this rank's piece of a parameter's float32 master, as a view."""
        (flat_P,) = group["params"]
        return _local(flat_P, slot, partition=group["partition"])
