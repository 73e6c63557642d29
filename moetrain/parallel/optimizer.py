"""Muon and AdamW on the flat float32 vectors of each rank under ZeRO.

AdamW and momentum are elementwise. If a matrix is split over ranks, those ranks exchange their pieces, each
orthogonalises the whole matrix and keeps its own slice of the result. This is Algorithm 1 of Moonlight (arXiv
2502.16982), but a rank receives only the matrices of which it holds a piece. `parallel.partition` defines which
elements belong to which rank.

B matrices of one shape, M rows, N columns; P elements of a rank's vector.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from moetrain.kernels.build import Library
from moetrain.optim.adamw import adamw_update
from moetrain.optim.config import OptimConfig, OptimizerName
from moetrain.optim.muon import apply_update, dtype_of_products, nesterov, orthogonal_update
from moetrain.parallel.partition import Matrix, Partition, Slot, matrices_of, own_piece, whole_matrices
from moetrain.parallel.state import STATE_NAMES

_BATCH_ELEMENTS = 1 << 26  # orthogonalised at once: 256 MB in float32, and a few times as much for intermediates


class PartitionedOptimizer(torch.optim.Optimizer):
    """Muon and AdamW for DeepSpeed: after `bind`, each parameter group is one flat vector.

    A group contains `rule`, `slots`, and DeepSpeed's own `moe` and `name`. DeepSpeed steps one group at a time, with
    the clipped gradient in the vector's `.grad`. Under ZeRO 3 it empties the `params` of the other groups meanwhile.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, config: OptimConfig, dtype: torch.dtype, library: Library | None
    ) -> None:
        super().__init__(groups, defaults={"lr": config.lr, "step": 0, "partition": None})
        self.config = config
        self.dtype = dtype_of_products(dtype, library=library)
        self.library = library

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does, without its decorator, which imports torch's compiler and takes seconds."""
        torch.optim.Optimizer.add_param_group.__wrapped__(self, param_group)  # type: ignore[attr-defined]

    def bind(self, vectors: Iterable[torch.Tensor], partitions: Iterable[Partition]) -> None:
        """Set the vector and the partition of each group, and create its optimizer state as zeros."""
        for group, flat_P, partition in zip(self.param_groups, vectors, partitions, strict=True):
            group["vector"] = flat_P
            group["partition"] = partition
            group["matrices"] = matrices_of(group["slots"]) if group["rule"] == OptimizerName.muon else []
            for name in STATE_NAMES[group["rule"]]:
                self.state[flat_P][name] = torch.zeros_like(flat_P)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the vector of every group in `param_groups` whose `params` is not empty."""
        del closure  # required by torch's signature
        for group in self.param_groups:
            if not group["params"]:
                continue
            (flat_P,) = group["params"]
            assert flat_P is group["vector"], "DeepSpeed steps another tensor than the one passed to bind"
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
                    library=self.library,
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
                    own_piece(update_P, matrix, partition=partition).copy_(update_MN.reshape(-1)[mine])
        apply_update(flat_P, update_P, learning_rate=group["lr"], weight_decay=self.config.weight_decay)

    @torch.no_grad()
    def multiply_rows(self, factors: Mapping[str, torch.Tensor]) -> None:
        """Multiply row i of the parameter `name` by `factors[name][i]`, in this rank's pieces of the masters."""
        for group in self.param_groups:
            partition = group["partition"]
            for slot in group["slots"]:
                if slot.name not in factors:
                    continue
                factor_M = factors[slot.name].to(group["vector"].device)
                num_rows, num_columns = slot.shape
                assert factor_M.shape == (num_rows,)
                mine = slice(*partition.piece(slot.whole, partition.index))
                by_element = factor_M[:, None].expand(num_rows, num_columns).reshape(-1)[mine]
                self.weight_piece(group, slot).mul_(by_element)

    def state_piece(self, group: Mapping[str, Any], slot: Slot, *, name: str) -> torch.Tensor:
        """Return this rank's piece of a parameter's state `name`, as a view."""
        return own_piece(self.state[group["vector"]][name], slot.whole, partition=group["partition"])

    def weight_piece(self, group: Mapping[str, Any], slot: Slot) -> torch.Tensor:
        """Return this rank's piece of a parameter's float32 master, as a view."""
        return own_piece(group["vector"], slot.whole, partition=group["partition"])
