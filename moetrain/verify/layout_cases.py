"""Training in one layout of `verify layouts`, the values recorded per step, and the faults that can be injected.

Training uses the ordinary `train_step` with the objective of pretraining. In every second step the last half of the
rows is padding, so that with two or four ranks half of the ranks have no tokens. In the unbalanced scenario the balance
bias sends every token to the same experts, so that with EP the experts of other ranks receive no tokens.
"""

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from moetrain.commands.verify import LayoutFault, LayoutScenario, VerifyLayoutsRun
from moetrain.data.batch import WEIGHT, TokenBatch
from moetrain.model.attention import MaxLogits
from moetrain.model.config import Recompute
from moetrain.model.router import Routing
from moetrain.model.transformer import Transformer
from moetrain.optim.config import OptimizerName
from moetrain.parallel.config import EngineName, ParallelConfig
from moetrain.parallel.engine import build_engine
from moetrain.parallel.protocol import Engine, Objective, ObjectiveResult, StepReport, clip_factor_of
from moetrain.quant.config import QuantConfig
from moetrain.runtime import torch_stream
from moetrain.train.loss import GlobalCounts, language_model_objective
from moetrain.train.rows import rank_rows, split_rows
from moetrain.train.step import train_step

_PUSH = 10.0  # added to the bias of the first experts; scores are at most 1


class Order(StrEnum):
    """Order of the rows of a step: all in one batch, or one by one from the last to the first."""

    whole = "whole"
    reversed_rows = "reversed_rows"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A training layout that is compared with the plain loop."""

    optimizer: OptimizerName
    scenario: LayoutScenario
    world_size: int
    expert: int
    zero: int
    accumulation: int
    recompute: Recompute
    draw: int = 0
    """Index of the random draw of the training tokens."""

    @property
    def reference(self) -> str:
        """Name of the plain run with which the layout is compared."""
        return f"{self.optimizer}.{self.scenario}"

    @property
    def name(self) -> str:
        """Name in the table."""
        return (
            f"{self.optimizer} {self.scenario}: {self.world_size} ranks, EP {self.expert}, ZeRO {self.zero}, "
            f"accumulation {self.accumulation}, recompute {self.recompute}"
        )


@dataclass(kw_only=True)
class Trace:
    """Values recorded during a run, one list item per step. `loads`: number of tokens per expert."""

    loss: list[float]
    grad_norm: list[float]
    clip_factor: list[float]
    bias: list[list[float]]
    loads: list[list[float]]


def layouts_of(run: VerifyLayoutsRun) -> list[Layout]:
    """Return all valid combinations, grouped by world size."""
    return [
        Layout(
            optimizer=optimizer,
            scenario=scenario,
            world_size=world_size,
            expert=expert,
            zero=zero,
            accumulation=accumulation,
            recompute=recompute,
        )
        for world_size in run.world_sizes
        for optimizer in run.optimizers
        for scenario in run.scenarios
        for expert in run.experts
        if world_size % expert == 0 and run.model.num_experts % expert == 0
        for zero in run.zeros
        for accumulation in run.accumulations
        if run.rows % (world_size * accumulation) == 0
        for recompute in run.recomputes
    ]


def make_batch(run: VerifyLayoutsRun, step: int, *, draw: int) -> TokenBatch:
    """Return the rows of a step: two documents per row, repeated random tokens, random loss weights, and padding."""
    shape = (run.rows, run.seq_len)
    stream = torch_stream(run.run.seed, "verify/layouts", draw, step)
    tokens_BT = torch.randint(run.model.vocab_size, shape, generator=stream)
    tokens_BT[:, 2::2] = tokens_BT[:, 1:-1:2]
    segments_BT = torch.ones(shape, dtype=torch.int64)
    segments_BT[:, run.seq_len // 2 :] = 2
    segments_BT[:, -2:] = 0
    positions_BT = torch.arange(run.seq_len).remainder(run.seq_len // 2).repeat(run.rows, 1)
    if step % 2:
        segments_BT[run.rows // 2 :] = 0
    return TokenBatch(
        tokens_BT=tokens_BT,
        segments_BT=segments_BT,
        positions_BT=positions_BT,
        loss_mask_BT=(positions_BT > 0) & (segments_BT > 0),
        columns={WEIGHT: 0.5 + torch.rand(shape, generator=stream)},
    )


def make_engine(run: VerifyLayoutsRun, layout: Layout, *, engine: EngineName) -> Engine:
    """Return the engine of a layout. With `engine=torch` only the layout's optimizer and scenario are used."""
    is_plain = engine is EngineName.torch
    optim = run.optim_of(layout.optimizer)
    built = build_engine(
        run.model,
        ParallelConfig(
            engine=engine,
            expert=1 if is_plain else layout.expert,
            zero=1 if is_plain else layout.zero,
            recompute=Recompute.none if is_plain else layout.recompute,
            expert_rows=None if is_plain else run.expert_rows,
            timeout_s=run.timeout_s,
        ),
        optim_config=optim,
        quant_config=QuantConfig(),
        compute_dtype=torch.float32,
        seed=run.run.seed,
    )
    if layout.scenario is LayoutScenario.unbalanced:
        for _, layer in built.model.moe_layers():
            layer.gate.e_score_correction_bias[: run.model.num_experts_per_token] += _PUSH
    return built


def take_steps(run: VerifyLayoutsRun, engine: Engine, *, layout: Layout, order: Order, fault: LayoutFault) -> Trace:
    """Train for `run.steps` steps on the layout's tokens and return the recorded values. Collective.

    With `reversed_rows` each micro-batch is a single row, regardless of the layout's accumulation.
    """
    trace = Trace(loss=[], grad_norm=[], clip_factor=[], bias=[], loads=[])
    topology = engine.topology
    observed: list[torch.Tensor] = []
    _inject(engine, fault, clip_norm=run.optim.clip_norm)
    doubles = fault is LayoutFault.doubled_count and topology.rank == topology.world_size - 1
    for step in range(run.steps):
        mine = rank_rows(make_batch(run, step, draw=layout.draw), rank=topology.rank, world_size=topology.world_size)
        size = 1 if order is Order.reversed_rows else len(mine.tokens_BT) // layout.accumulation
        parts = split_rows(mine, rows=size)
        values = train_step(
            engine,
            lambda counts: _objective(run, counts, observed=observed, doubles=doubles),
            micro_batches=parts[::-1] if order is Order.reversed_rows else parts,
            learning_rate=run.optim.lr,
            balance=run.model.balance,
            step=step,
            qk_clip=run.optim.qk_clip,
        )
        trace.loss.append(values["loss"])
        trace.grad_norm.append(values["grad_norm"])
        trace.clip_factor.append(values["clip_factor"])
        biases = [layer.gate.e_score_correction_bias for _, layer in engine.model.moe_layers()]
        trace.bias.append(torch.cat(biases).tolist() if biases else [])
        trace.loads.append(topology.all_reduce_sum(torch.stack(observed).sum(dim=0)).flatten().double().tolist())
        observed.clear()
    return trace


def _objective(
    run: VerifyLayoutsRun, counts: GlobalCounts, *, observed: list[torch.Tensor], doubles: bool
) -> Objective:
    max_logits = MaxLogits.needed(run.optim.qk_clip)
    inner = language_model_objective(counts, balance=run.model.balance, max_logits=max_logits)

    def objective(model: Transformer, batch: TokenBatch) -> ObjectiveResult:
        result = inner(model, batch)
        if doubles:
            result.counts_LE = 2 * result.counts_LE
        observed.append(result.counts_LE)
        return result

    return objective


def _inject(engine: Engine, fault: LayoutFault, *, clip_norm: float) -> None:
    """Inject a fault: leave the experts out of the reported gradient norm, or drop a token's experts on this rank."""
    if fault is LayoutFault.norm_without_experts:
        vars(engine)["step"] = _NormWithoutExperts(engine, clip_norm=clip_norm).step
    if fault is LayoutFault.dropped_token:
        engine.model.moe_layers()[0][1].gate.register_forward_hook(_drop_first)


class _NormWithoutExperts:
    """Wraps an engine's step: reports the gradient norm without the experts, while the update stays correct."""

    def __init__(self, engine: Engine, *, clip_norm: float) -> None:
        self._true_step, self._topology, self._clip_norm = engine.step, engine.topology, clip_norm
        self._loss_factor = engine.loss_factor
        self._params = [param for _, layer in engine.model.moe_layers() for param in layer.experts.parameters()]
        self._sums: dict[torch.nn.Parameter, torch.Tensor] = {}
        for param in self._params:
            param.register_hook(partial(self._add, param))  # type: ignore[no-untyped-call]

    def _add(self, param: torch.nn.Parameter, gradient: torch.Tensor) -> None:
        self._sums[param] = self._sums.get(param, 0.0) + gradient.detach().double()

    def step(self, learning_rate: float) -> StepReport:
        """Take the correct step, then report a gradient norm and clip factor without the experts. Collective."""
        report, topology = self._true_step(learning_rate), self._topology
        squares = torch.zeros(1, dtype=torch.float64, device=topology.device)
        for param in self._params:  # the same order on every rank, because all_reduce must match
            whole = self._sums[param] / self._loss_factor
            if topology.world_size > 1:
                dist.all_reduce(whole, group=topology.expert_data_group)  # None: all ranks
            squares += whole.square().sum()
        self._sums.clear()
        # Each expert is on world_size / expert_size ranks, so the sum over ranks counts it that often.
        of_experts = float(topology.all_reduce_sum(squares)) * topology.expert_size / topology.world_size
        norm = math.sqrt(max(report.grad_norm**2 - of_experts, 0.0))
        return replace(report, grad_norm=norm, clip_factor=clip_factor_of(norm, clip_norm=self._clip_norm))


def _drop_first(gate: torch.nn.Module, inputs: Any, routing: Routing) -> Routing:
    del gate, inputs  # torch's signature
    kept_N1 = torch.ones_like(routing.weights_NK[:, :1])
    kept_N1[0] = 0.0
    return routing._replace(weights_NK=routing.weights_NK * kept_N1)
