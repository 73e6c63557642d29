"""Two gloo processes against the plain loop in this one. One launch serves all tests of this file."""

import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from moetrain.data.batch import TokenBatch
from moetrain.model.config import Recompute
from moetrain.model.moe import Experts, LocalDispatcher
from moetrain.model.transformer import Transformer
from moetrain.optim.config import OptimizerName
from moetrain.parallel.config import EngineName
from moetrain.parallel.dispatch import AllToAllDispatcher
from moetrain.parallel.engine import Engine, ObjectiveResult, StepReport
from moetrain.parallel.partition import (
    Matrix,
    ParameterPartition,
    Partition,
    Slot,
    VectorPartition,
    matrices_of,
    own_piece,
    slots_of,
    whole_matrices,
)
from moetrain.parallel.state import TensorReader
from moetrain.parallel.topology import Topology
from moetrain.runtime import torch_stream
from tests.distributed import run_ranks
from tests.parallel.nano import (
    LEARNING_RATE,
    Trace,
    batch_of,
    build,
    difference,
    identical,
    largest_gap,
    model_config,
    objective_for,
    padding,
    train,
)

FP32_ROUNDING = 1e-6  # relative, on loss, gradient norm and clip factor
STATE_ROUNDING = 5e-5  # absolute, after steps of LEARNING_RATE
ADAMW_EPS = 1e-5  # with 1e-8 AdamW makes whole steps of gradients that are themselves little more than rounding
MUON_LAYOUTS = list(product((1, 2, 3), (1, 2)))  # (zero, expert)
ADAMW_LAYOUTS = [(1, 2), (3, 1), (3, 2)]


_SCALED = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"


@dataclass(kw_only=True)
class Seen:
    """What one rank saw of a layout."""

    traces: list[Trace]
    state: dict[str, torch.Tensor] | None


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(_both_ranks, 2)


def _both_ranks() -> dict[str, Any]:
    torch.set_num_threads(1)
    seen: dict[str, Any] = {}
    with _captured_output() as output:
        for zero, expert in MUON_LAYOUTS:
            seen[f"muon {zero} {expert}"] = _see(build(zero=zero, expert=expert))
        for zero, expert in ADAMW_LAYOUTS:
            seen[f"adamw {zero} {expert}"] = _see(
                build(zero=zero, expert=expert, optimizer=OptimizerName.adamw, eps=ADAMW_EPS)
            )
        split = build(zero=2, expert=2)
        seen["resumed"] = _resumed(split, build(zero=1, expert=1, seed=2))
        seen["resumed 3"] = _resumed(build(zero=3, expert=2), build(zero=3, expert=1, seed=2), zero=3)
        seen["tokens on one rank"] = [_see_unbalanced(build(zero=zero, expert=2)) for zero in (2, 3)]
        seen["recomputed"] = [_see(build(zero=zero, expert=2, recompute=Recompute.blocks)) for zero in (2, 3)]
        seen["discarded"] = [_discarded(build(zero=zero, expert=2)) for zero in (2, 3)]
        seen["infinite"] = [_infinite(build(zero=zero, expert=2)) for zero in (2, 3)]
        seen["quantised"] = [_quantised(build(zero=zero, expert=2, quantize=True)) for zero in (2, 3)]
        seen["dispatch"] = [_dispatch(split.topology, num_tokens=counts) for counts in ((5, 3), (0, 4), (0, 0))]
        seen["collectives"] = _collectives(split.topology)
        seen["whole matrices"] = _whole_matrices(split.topology)
        seen["ownership"] = {
            (zero, expert): _ownership(build(zero=zero, expert=expert)) for zero in (2, 3) for expert in (1, 2)
        }
    seen["output"] = output.read_text()
    return seen


@contextmanager
def _captured_output() -> Iterator[Path]:
    """Send this process's standard output and error to a file."""
    path = Path(tempfile.mkstemp()[1])
    with path.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        yield path


def _see(engine: Engine) -> Seen:
    return Seen(traces=train(engine, range(3)), state=engine.gather_state(with_optimizer=True))


def _resumed(split: Engine, whole: Engine, *, zero: int = 1) -> dict[str, Any]:
    """Train with split experts, go on without, and go on with split experts again from the same state."""
    train(split, range(2))
    state = split.topology.broadcast_object(split.gather_state(with_optimizer=True))
    assert state is not None
    whole.load_state(TensorReader(state), with_optimizer=True)
    arrived = whole.gather_state(with_optimizer=True)
    returned = build(zero=zero, expert=2, seed=3)
    returned.load_state(TensorReader(state), with_optimizer=True)
    back = returned.gather_state(with_optimizer=True)
    return {
        "state": state,
        "identical": [identical(other, state) for other in (arrived, back) if other is not None],
        "whole": train(whole, range(2, 3)),
        "split": train(split, range(2, 3)),
        "again": train(returned, range(2, 3)),
    }


def _discarded(engine: Engine) -> Seen:
    """Drop a gradient, multiply the rows of a weight, and train on: the padding of ZeRO 3 must not remember it."""
    whole = batch_of(7)
    engine.accumulate(objective_for(whole), whole, is_last=True)
    engine.discard()
    engine.multiply_rows({_SCALED: torch.linspace(0.5, 1.5, engine.model.config.kv_lora_rank + 4)})
    return _see(engine)


def _infinite(engine: Engine) -> dict[str, Any]:
    """Meet a finite loss with a gradient of rank 1 that is not finite, and train on."""
    whole = batch_of(7)
    mine = whole.rows(2 * engine.topology.rank, 2 * engine.topology.rank + 2)

    def objective(model: Transformer, batch: TokenBatch) -> ObjectiveResult:
        result = objective_for(whole)(model, batch)
        if engine.topology.rank == 1:
            result.loss = result.loss + (result.loss - result.loss.detach()).sqrt()
        return result

    before = engine.gather_state(with_optimizer=True)
    loss = engine.accumulate(objective, mine, is_last=True).loss.item()
    report = engine.step(LEARNING_RATE)
    after = engine.gather_state(with_optimizer=True)
    is_same = None if before is None or after is None else identical(before, after)
    return {"loss": loss, "report": report, "is_same": is_same, "following": _see(engine)}


def _quantised(engine: Engine) -> Seen:
    """Train with quantised experts; whoever kept the first step's would go on with them."""
    return Seen(traces=train(engine, range(3)), state=None)


def _force_first_experts(engine: Engine) -> None:
    """Let the balance bias send every token to experts 0 and 1, which live on the first of two ranks."""
    for _, layer in engine.model.moe_layers():
        layer.gate.e_score_correction_bias.copy_(torch.tensor([10.0, 10.0, 0.0, 0.0]))


def _see_unbalanced(engine: Engine) -> Seen:
    """Give all rows to rank 0 and only padding to rank 1, and all tokens to the experts of rank 0."""

    def micro_batches_of(whole: TokenBatch, rank: int, world_size: int) -> list[TokenBatch]:
        return [whole if rank == 0 else padding()]

    _force_first_experts(engine)
    traces = train(engine, range(2), micro_batches_of=micro_batches_of)
    return Seen(traces=traces, state=engine.gather_state(with_optimizer=True))


def _dispatch(topology: Topology, *, num_tokens: tuple[int, int]) -> dict[str, float]:
    """Return the largest gaps of output and gradients between both dispatchers; tokens are those of both ranks."""
    config = model_config()
    stream = torch_stream(0, "dispatch")
    whole = Experts(config, num_local=4, compute_dtype=torch.float32)
    for param in whole.parameters():
        param.data.normal_(std=0.3, generator=stream)
    part = Experts(config, num_local=2, compute_dtype=torch.float32)
    mine = slice(2 * topology.rank, 2 * topology.rank + 2)
    part.gate_up_proj.data.copy_(whole.gate_up_proj[mine].detach())
    part.down_proj.data.copy_(whole.down_proj[mine].detach())
    total = sum(num_tokens)
    x_ND = torch.randn(total, config.hidden_size, generator=stream)
    ids_NK = torch.rand(total, 4, generator=stream).argsort(dim=1)[:, :2]
    weights_NK = torch.rand(total, 2, generator=stream)
    pull_ND = torch.randn(total, config.hidden_size, generator=stream)
    first = 0 if topology.rank == 0 else num_tokens[0]
    rows = slice(first, first + num_tokens[topology.rank])

    x_whole, x_part = x_ND.clone().requires_grad_(), x_ND[rows].clone().requires_grad_()
    w_whole, w_part = weights_NK.clone().requires_grad_(), weights_NK[rows].clone().requires_grad_()
    y_whole = LocalDispatcher()(x_whole, ids_NK, w_whole, whole)
    y_part = AllToAllDispatcher(topology, num_experts=4)(x_part, ids_NK[rows], w_part, part)
    (y_whole * pull_ND).sum().backward()
    (y_part * pull_ND[rows]).sum().backward()
    pairs = {
        "output": (y_part, y_whole[rows]),
        "x": (x_part.grad, x_whole.grad[rows]),
        "weights": (w_part.grad, w_whole.grad[rows]),
        "gate_up": (part.gate_up_proj.grad, whole.gate_up_proj.grad[mine]),
        "down": (part.down_proj.grad, whole.down_proj.grad[mine]),
    }
    return {name: (a - b).abs().sum().item() for name, (a, b) in pairs.items()}


def _collectives(topology: Topology) -> dict[str, Any]:
    mine = torch.tensor([float(topology.rank), 5.0])
    return {
        "sum": topology.all_reduce_sum(mine).tolist(),
        "max": topology.all_reduce_max(mine).tolist(),
        "mine": mine.tolist(),
        "gathered": topology.gather_objects({"rank": topology.rank}),
        "broadcast": topology.broadcast_object(f"from {topology.rank}"),
        "expert rank": topology.expert_rank,
    }


def _whole_matrices(topology: Topology) -> bool:
    """Cut a vector of matrices in two at odd places and return whether each rank sees its matrices whole."""
    shapes = {"a.weight": (3, 5), "experts.gate_up_proj": (2, 4, 3), "b.weight": (7, 2), "c.weight": (1, 1)}
    slots = slots_of([(name, torch.empty(shape)) for name, shape in shapes.items()])
    flat = torch.arange(slots[-1].end).float()
    matrices = matrices_of(slots)
    assert topology.expert_group is not None
    for size in range((slots[-1].end + 1) // 2, slots[-1].end):
        cut = VectorPartition(size=size, index=topology.rank, process_group=topology.expert_group)
        padded = torch.cat([flat, torch.zeros(2 * size - flat.numel())])
        mine = padded[topology.rank * size : (topology.rank + 1) * size]
        if not _arrive(mine, matrices, partition=cut, flat=flat):
            return False
    each = ParameterPartition.of(slots, num_ranks=2, index=topology.rank, process_group=topology.expert_group)
    mine = torch.full((sum(-(-slot.shape.numel() // 2) for slot in slots),), float("nan"))  # padding stays so
    for slot in slots:
        first, last = each.piece(slot.whole, topology.rank)
        own_piece(mine, slot.whole, partition=each).copy_(flat[slot.offset + first : slot.offset + last])
    return _arrive(mine, matrices, partition=each, flat=flat)


def _arrive(mine: torch.Tensor, matrices: list[Matrix], *, partition: Partition, flat: torch.Tensor) -> bool:
    whole = whole_matrices(mine, matrices, partition=partition)
    held = [m for m in matrices if partition.index in partition.owners(m)]
    starts = {m: m.slot.offset + m.start for m in held}
    return list(whole) == held and all(torch.equal(whole[m], flat[starts[m] : starts[m] + m.length]) for m in held)


class _CountingReader(TensorReader):
    """Counts the elements that are read of each tensor."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.num_read: dict[str, int] = {}

    def read(self, name: str, *, first: int, last: int) -> torch.Tensor:
        self.num_read[name] = self.num_read.get(name, 0) + last - first
        return super().read(name, first=first, last=last)


def _ownership(engine: Engine) -> dict[str, Any]:
    """Return the ranges that this rank owns, by tensor, and how many elements it reads of each when it loads."""
    owned: dict[str, list[tuple[int, int]]] = {}
    for piece in engine.pieces(with_optimizer=True):
        owned.setdefault(piece.name, []).append((piece.start, piece.start + piece.values_P.numel()))
    state = engine.topology.broadcast_object(engine.gather_state(with_optimizer=True))
    assert state is not None
    reader = _CountingReader(state)
    engine.load_state(reader, with_optimizer=True)
    return {"owned": owned, "read": reader.num_read, "sizes": {name: tensor.numel() for name, tensor in state.items()}}


def _plain() -> Engine:
    torch.set_num_threads(1)
    return build(EngineName.torch)


@pytest.mark.parametrize(("zero", "expert"), MUON_LAYOUTS)
def test_muon_gives_the_numbers_of_one_process_in_every_layout(
    ranks: list[dict[str, Any]], zero: int, expert: int
) -> None:
    expected = _see(_plain())
    main, other = (rank[f"muon {zero} {expert}"] for rank in ranks)
    assert all(trace.report.clip_factor < 1 for trace in main.traces)
    assert difference(main.traces, expected.traces) < FP32_ROUNDING
    assert other.traces == main.traces
    assert other.state is None
    assert main.state is not None and expected.state is not None
    assert largest_gap(main.state, expected.state) < STATE_ROUNDING


@pytest.mark.parametrize(("zero", "expert"), ADAMW_LAYOUTS)
def test_adamw_gives_the_numbers_of_one_process(ranks: list[dict[str, Any]], zero: int, expert: int) -> None:
    expected = _see(build(EngineName.torch, optimizer=OptimizerName.adamw, eps=ADAMW_EPS))
    main = ranks[0][f"adamw {zero} {expert}"]
    assert difference(main.traces, expected.traces) < FP32_ROUNDING
    assert main.state is not None and expected.state is not None
    assert largest_gap(main.state, expected.state) < STATE_ROUNDING


@pytest.mark.parametrize("case", ["resumed", "resumed 3"])
def test_a_state_goes_bit_for_bit_from_split_experts_to_whole_ones_and_back(
    ranks: list[dict[str, Any]], case: str
) -> None:
    resumed = ranks[0][case]
    assert resumed["identical"] == [True, True]
    plain = _plain()
    plain.load_state(TensorReader(resumed["state"]), with_optimizer=True)
    state = plain.gather_state(with_optimizer=True)
    assert state is not None and identical(state, resumed["state"])
    following = train(plain, range(2, 3))
    assert difference(resumed["whole"], following) < FP32_ROUNDING
    assert difference(resumed["split"], following) < FP32_ROUNDING
    assert resumed["again"] == resumed["split"]


@pytest.mark.parametrize("layout", list(product((2, 3), (1, 2))))
def test_every_element_of_the_state_has_one_owner_and_both_ranks_own_half(
    ranks: list[dict[str, Any]], layout: tuple[int, int]
) -> None:
    first, second = (rank["ownership"][layout] for rank in ranks)
    for name, size in first["sizes"].items():
        ranges = sorted(first["owned"].get(name, []) + second["owned"].get(name, []))
        assert [start for start, _ in ranges] == [0, *(end for _, end in ranges[:-1])], name
        assert ranges[-1][1] == size, name
    num_owned = [
        sum(end - start for ranges in side["owned"].values() for start, end in ranges) for side in (first, second)
    ]
    assert max(num_owned) < 1.05 * min(num_owned)


def test_a_rank_reads_its_own_experts_and_its_own_slice_of_the_optimizer_state(ranks: list[dict[str, Any]]) -> None:
    experts, dense = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.0.mlp.gate_proj.weight"
    for rank in ranks:
        seen = rank["ownership"][2, 2]
        assert seen["read"][experts] == seen["sizes"][experts] // 2
        assert seen["read"][f"optimizer/{experts}/momentum"] == seen["sizes"][experts] // 2
        assert seen["read"][dense] == seen["sizes"][dense]
        partitioned = rank["ownership"][3, 2]["read"]
        assert partitioned[experts] == seen["sizes"][experts] // 2
        assert partitioned[dense] == seen["sizes"][dense] // 2
        owned = sum(end - start for start, end in seen["owned"].get(f"optimizer/{dense}/momentum", []))
        assert seen["read"].get(f"optimizer/{dense}/momentum", 0) == owned


@pytest.mark.parametrize("case", [0, 1])
def test_a_rank_without_tokens_and_one_without_chosen_experts_change_nothing(
    ranks: list[dict[str, Any]], case: int
) -> None:
    plain = _plain()
    _force_first_experts(plain)
    expected = train(plain, range(2), rows_per_micro_batch=4)
    main = ranks[0]["tokens on one rank"][case]
    assert all(counts_E[2:] == [0, 0] for trace in main.traces for counts_E in trace.counts_LE)
    assert difference(main.traces, expected) < FP32_ROUNDING
    state = plain.gather_state(with_optimizer=True)
    assert state is not None and largest_gap(main.state, state) < STATE_ROUNDING


def test_dispatch_over_ranks_equals_dispatch_in_one_place(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for gaps in rank["dispatch"]:
            assert max(gaps.values()) < 1e-4, gaps


def test_matrices_that_are_cut_anywhere_arrive_whole(ranks: list[dict[str, Any]]) -> None:
    assert [rank["whole matrices"] for rank in ranks] == [True, True]


def test_collectives_bring_every_rank_the_same_and_change_no_input(ranks: list[dict[str, Any]]) -> None:
    for index, seen in enumerate(rank["collectives"] for rank in ranks):
        assert seen["sum"] == [1.0, 10.0]
        assert seen["max"] == [1.0, 5.0]
        assert seen["mine"] == [float(index), 5.0]
        assert seen["gathered"] == ([{"rank": 0}, {"rank": 1}] if index == 0 else None)
        assert seen["broadcast"] == "from 0"
        assert seen["expert rank"] == index


def test_a_partition_knows_the_pieces_of_a_matrix() -> None:
    before = Slot(name="a", shape=torch.Size([5]), offset=0)
    slot = Slot(name="b", shape=torch.Size([2, 6]), offset=5)
    (matrix,) = matrices_of([slot])
    assert list(VectorPartition(size=8).owners(matrix)) == [0, 1, 2]
    pieces = [VectorPartition(size=8).piece(matrix, index) for index in range(4)]
    assert pieces == [(0, 3), (3, 11), (11, 12), (12, 12)]
    assert list(VectorPartition(size=5).owners(matrix)) == [1, 2, 3]
    assert [VectorPartition(size=8, index=index).place(matrix) for index in range(3)] == [5, 0, 0]
    each = ParameterPartition.of([before, slot], num_ranks=5, index=2)
    assert list(each.owners(matrix)) == [0, 1, 2, 3]
    assert [each.piece(matrix, index) for index in range(5)] == [(0, 3), (3, 6), (6, 9), (9, 12), (12, 12)]
    assert each.place(matrix) == 1


@pytest.mark.parametrize(("case", "zero"), [(0, 2), (1, 3)])
def test_recomputed_blocks_change_no_bit_where_experts_are_split(
    ranks: list[dict[str, Any]], case: int, zero: int
) -> None:
    for rank in ranks:
        assert rank["recomputed"][case].traces == rank[f"muon {zero} 2"].traces


@pytest.mark.parametrize("case", [0, 1])
def test_a_dropped_gradient_and_multiplied_rows_are_the_same_in_every_layout(
    ranks: list[dict[str, Any]], case: int
) -> None:
    expected, found = _discarded(_plain()), ranks[0]["discarded"][case]
    assert difference(found.traces, expected.traces) < FP32_ROUNDING
    assert found.state is not None and expected.state is not None
    assert largest_gap(found.state, expected.state) < STATE_ROUNDING


@pytest.mark.parametrize("case", [0, 1])
def test_a_gradient_that_is_infinite_on_one_rank_leaves_no_trace_on_any(ranks: list[dict[str, Any]], case: int) -> None:
    main, other = (rank["infinite"][case] for rank in ranks)
    assert math.isfinite(main["loss"]) and math.isfinite(other["loss"])
    assert main["report"] == other["report"] == StepReport(grad_norm=math.inf, clip_factor=0.0)
    assert main["is_same"] is True
    expected, found = _see(_plain()), main["following"]
    assert difference(found.traces, expected.traces) < FP32_ROUNDING
    assert found.state is not None and expected.state is not None
    assert largest_gap(found.state, expected.state) < STATE_ROUNDING


@pytest.mark.parametrize("case", [0, 1])
def test_quantised_experts_are_those_of_the_step_in_every_layout(ranks: list[dict[str, Any]], case: int) -> None:
    torch.set_num_threads(1)
    expected = train(build(EngineName.torch, quantize=True), range(3))
    assert difference(ranks[0]["quantised"][case].traces, expected) < FP32_ROUNDING


def test_training_is_silent(ranks: list[dict[str, Any]]) -> None:
    lines = [line for rank in ranks for line in rank["output"].splitlines()]
    assert [line for line in lines if "OVERFLOW! Skipping step" not in line] == []  # of the two gradients dropped here
