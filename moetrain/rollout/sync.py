"""Copies the training engine's weights to generation, tensor by tensor, with the values that training multiplies with.

All ranks request the tensors in the same order. A tensor that is not quantised is broadcast by the ranks that own its
pieces, in the dtype in which generation reads it. A quantised tensor is assembled in bf16 on one rank, quantised there,
and broadcast in its stored form: codes and scales, 4.5 bits per weight in INT4. Besides the generation weights, a rank
holds one tensor at a time.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moetrain.errors import RolloutError
from moetrain.inference.build import build_model
from moetrain.inference.mode import Mode
from moetrain.inference.protocol import Model
from moetrain.kernels.build import Library
from moetrain.model.config import ModelConfig
from moetrain.parallel.engine import Engine
from moetrain.parallel.protocol import Piece
from moetrain.parallel.topology import Topology
from moetrain.quant.config import QuantConfig
from moetrain.quant.formats import FORMATS
from moetrain.quant.grids import Quantized, quantize

_ROUTER = ".mlp.gate.weight"


def sync_weights(
    engine: Engine,
    *,
    config: ModelConfig,
    quant: QuantConfig,
    library: Library | None = None,
    dtype: torch.dtype = torch.bfloat16,
    mode: Mode = Mode.fast,
) -> Model:
    """Return the engine's present weights in the form for generation, on every rank. A collective.

    library: the native kernels to generate with, None for torch. Raises RolloutError when the ranks did not
    receive the same bytes.
    """
    tensors = StreamedTensors(engine, quant=quant, dtype=dtype)
    device = engine.topology.device
    model = build_model(tensors, config=config, quant=quant, library=library, dtype=dtype, device=device, mode=mode)
    tensors.check()
    return model


@dataclass(frozen=True, kw_only=True)
class _PieceLocation:
    """Where a piece of a tensor is: piece number `index` of rank `owner`, `count` elements of the flat tensor."""

    owner: int
    index: int
    start: int
    count: int


class StreamedTensors(Mapping[str, "torch.Tensor | Quantized"]):
    """The engine's tensors by name. An access transfers the tensor to every rank.

    An access is a collective: all ranks must request the same names in the same order. Tensors are not cached.
    """

    def __init__(self, engine: Engine, *, quant: QuantConfig, dtype: torch.dtype) -> None:
        """Exchange which rank owns which piece; no tensor is sent. dtype: dtype of generation's matrix products."""
        self._topology = engine.topology
        self._quant = quant
        self._dtype = dtype
        self._own = list(engine.pieces(with_optimizer=False))
        self._locations: dict[str, list[_PieceLocation]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._num_requests = 0
        self._digest = hashlib.sha256()
        for owner, pieces in enumerate(_pieces_of_all_ranks(self._own, self._topology)):
            for index, (name, shape, start, count) in enumerate(pieces):
                self._shapes[name] = shape
                self._locations.setdefault(name, []).append(
                    _PieceLocation(owner=owner, index=index, start=start, count=count)
                )

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._shapes)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._shapes)

    def __getitem__(self, name: str) -> "torch.Tensor | Quantized":
        """Return a whole tensor on this rank's device; a quantised one as codes and scales. A collective."""
        shape = self._shapes[name]
        assembler = self._num_requests % self._topology.world_size
        self._num_requests += 1
        if len(shape) == 3 and self._quant.enabled:
            return self._quantized(name, shape, assembler=assembler)
        is_multiplied = len(shape) > 1 and not name.endswith(_ROUTER)
        return self._whole(name, shape, dtype=self._dtype if is_multiplied else torch.float32)

    def check(self) -> None:
        """Raise RolloutError when another rank received other bytes. A collective."""
        digests = self._topology.broadcast_object(self._topology.gather_objects(self._digest.hexdigest()))
        if digests is not None and len(set(digests)) > 1:
            raise RolloutError(f"the ranks received different weights: sha256 {', '.join(d[:12] for d in digests)}")

    def _whole(self, name: str, shape: Sequence[int], *, dtype: torch.dtype) -> torch.Tensor:
        """Return a whole tensor; each owner broadcasts its pieces."""
        whole_P = torch.empty(_numel(shape), dtype=dtype, device=self._topology.device)
        for location in self._locations[name]:
            values_P = whole_P[location.start : location.start + location.count]
            if location.owner == self._topology.rank:
                values_P.copy_(self._own[location.index].values_P)
            if self._topology.world_size > 1:
                dist.broadcast(values_P, src=location.owner)
        self._note(whole_P)
        return whole_P.view(*shape)

    def _quantized(self, name: str, shape: Sequence[int], *, assembler: int) -> Quantized:
        """Return a tensor [E, out, in] that rank `assembler` assembles in bf16, quantises and broadcasts."""
        stored_format = FORMATS[self._quant.format]
        whole_P = self._assembled(name, shape, assembler=assembler)
        stored: dict[str, torch.Tensor] = {}
        if whole_P is not None:
            rows_RI = whole_P.view(-1, shape[-1])
            stored = stored_format.encode(quantize(rows_RI, grid=self._quant.grid, group_size=self._quant.group_size))
        if self._topology.world_size > 1:
            stored = _broadcast(stored, src=assembler, device=self._topology.device)
        for tensor in stored.values():
            self._note(tensor)
        rows = stored_format.decode(stored)
        return Quantized(codes_XOI=rows.codes_XOI.view(*shape), scales_XOG=rows.scales_XOG.view(*shape[:-1], -1))

    def _assembled(self, name: str, shape: Sequence[int], *, assembler: int) -> torch.Tensor | None:
        """Return the flat tensor in bf16 on rank `assembler`, None on the others.

        bf16 gives the same codes as the fp32 master, because `quantize` casts to bf16 first.
        """
        rank, device = self._topology.rank, self._topology.device
        whole_P = torch.empty(_numel(shape), dtype=torch.bfloat16, device=device) if rank == assembler else None
        for location in self._locations[name]:
            if rank == location.owner:
                own_P = self._own[location.index].values_P.to(torch.bfloat16)
                if whole_P is None:
                    dist.send(own_P.contiguous(), dst=assembler)
                else:
                    whole_P[location.start : location.start + location.count] = own_P
            elif whole_P is not None:
                dist.recv(whole_P[location.start : location.start + location.count], src=location.owner)
        return whole_P

    def _note(self, tensor: torch.Tensor) -> None:
        self._digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data)


def _pieces_of_all_ranks(own: Sequence[Piece], topology: Topology) -> list[list[tuple[str, tuple[int, ...], int, int]]]:
    """Return name, shape, start and count of every rank's pieces, in rank order. A collective."""
    mine = [(piece.name, tuple(piece.shape), piece.start, piece.values_P.numel()) for piece in own]
    by_rank = topology.broadcast_object(topology.gather_objects(mine))
    assert by_rank is not None
    return by_rank


def _broadcast(tensors: Mapping[str, torch.Tensor], *, src: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return the tensors of rank `src` on every rank; the other ranks pass an empty mapping."""
    header = [[(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]]
    dist.broadcast_object_list(header, src=src)
    received = {}
    for name, dtype, shape in header[0]:
        tensor = tensors[name].to(device).contiguous() if tensors else torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(tensor, src=src)
        received[name] = tensor
    return received


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()
