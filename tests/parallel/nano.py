"""A model of a few thousand parameters, batches and an objective, for tests of engines."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from moetrain.data.batch import TokenBatch
from moetrain.kernels.build import Library
from moetrain.model.config import BalanceConfig, ModelConfig, Recompute
from moetrain.model.transformer import Transformer
from moetrain.optim.config import OptimConfig, OptimizerName
from moetrain.parallel.config import EngineName, ParallelConfig
from moetrain.parallel.engine import Engine, Objective, ObjectiveResult, StepReport, build_engine
from moetrain.quant.config import QuantConfig
from moetrain.runtime import torch_stream

VOCAB, ROWS, LENGTH = 48, 4, 12
LEARNING_RATE = 0.02


def model_config(*, num_shared_experts: int = 1) -> ModelConfig:
    return ModelConfig(
        num_shared_experts=num_shared_experts,
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=2,
        num_dense_layers=1,
        num_heads=2,
        q_lora_rank=12,
        kv_lora_rank=12,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        intermediate_size=40,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_token=2,
        routed_scaling_factor=1.5,
        initializer_range=0.2,
        balance=BalanceConfig(sequence_loss=0.01),
    )


def build(
    engine: EngineName = EngineName.deepspeed,
    *,
    optimizer: OptimizerName = OptimizerName.muon,
    zero: int = 1,
    expert: int = 1,
    quantize: bool = False,
    recompute: Recompute = Recompute.none,
    expert_rows: int | None = None,
    clip_norm: float = 0.5,
    eps: float = 1e-8,
    seed: int = 1,
    compute_dtype: torch.dtype = torch.float32,
    library: Library | None = None,
    num_shared_experts: int = 1,
) -> Engine:
    return build_engine(
        model_config(num_shared_experts=num_shared_experts),
        ParallelConfig(
            engine=engine, zero=zero, expert=expert, recompute=recompute, expert_rows=expert_rows, timeout_s=120
        ),
        optim_config=OptimConfig(name=optimizer, clip_norm=clip_norm, eps=eps),
        quant_config=QuantConfig(enabled=quantize),
        compute_dtype=compute_dtype,
        seed=seed,
        library=library,
    )


def batch_of(step: int) -> TokenBatch:
    """Return two documents a row; the last rows end in padding."""
    tokens_BT = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=torch_stream(0, "batch", step))
    segments_BT = torch.ones_like(tokens_BT)
    segments_BT[:, LENGTH // 2 :] = 2
    segments_BT[ROWS // 2 :, -3:] = 0
    positions_BT = torch.arange(LENGTH).remainder(LENGTH // 2).expand(ROWS, LENGTH).contiguous()
    return TokenBatch(
        tokens_BT=tokens_BT,
        segments_BT=segments_BT,
        positions_BT=positions_BT,
        loss_mask_BT=(positions_BT > 0) & (segments_BT > 0),
    )


def padding() -> TokenBatch:
    """Return a row without any token."""
    zeros_BT = torch.zeros(1, LENGTH, dtype=torch.int64)
    return TokenBatch(
        tokens_BT=zeros_BT,
        segments_BT=zeros_BT,
        positions_BT=zeros_BT,
        loss_mask_BT=zeros_BT.bool(),
    )


def objective_for(whole: TokenBatch) -> Objective:
    """Return the mean cross-entropy and balance loss of `whole`, as shares of its micro-batches."""

    def objective(model: Transformer, batch: TokenBatch) -> ObjectiveResult:
        output = model(batch.tokens_BT, segments_BT=batch.segments_BT, positions_BT=batch.positions_BT)
        logits_BTV = model.logits(output.hidden_BTD[:, :-1].flatten(0, 1))
        losses = F.cross_entropy(logits_BTV, batch.tokens_BT[:, 1:].flatten(), reduction="none")
        share = (losses * batch.loss_mask_BT[:, 1:].flatten()).sum() / whole.num_targets
        balance = model.config.balance.sequence_loss * output.balance_loss / whole.num_tokens
        return ObjectiveResult(loss=share + balance, counts_LE=output.counts_LE)

    return objective


@dataclass(kw_only=True)
class Trace:
    """What one step showed."""

    loss: float
    counts_LE: list[list[int]]
    report: StepReport


def train(
    engine: Engine,
    steps: range,
    *,
    rows_per_micro_batch: int = 1,
    micro_batches_of: Callable[[TokenBatch, int, int], list[TokenBatch]] | None = None,
) -> list[Trace]:
    """Take the steps on this rank's share of each batch."""
    topology = engine.topology
    traces = []
    for step in steps:
        whole = batch_of(step)
        if micro_batches_of is None:
            num_rows = ROWS // topology.world_size
            mine = whole.rows(topology.rank * num_rows, (topology.rank + 1) * num_rows)
            starts = range(0, num_rows, rows_per_micro_batch)
            micro_batches = [mine.rows(start, start + rows_per_micro_batch) for start in starts]
        else:
            micro_batches = micro_batches_of(whole, topology.rank, topology.world_size)
        last = len(micro_batches) - 1
        results = [
            engine.accumulate(objective_for(whole), batch, is_last=index == last)
            for index, batch in enumerate(micro_batches)
        ]
        loss = topology.all_reduce_sum(torch.stack([result.loss for result in results]).sum())
        counts_LE = topology.all_reduce_sum(torch.stack([result.counts_LE for result in results]).sum(dim=0))
        traces.append(Trace(loss=loss.item(), counts_LE=counts_LE.tolist(), report=engine.step(LEARNING_RATE)))
    return traces


def difference(ours: list[Trace], theirs: list[Trace]) -> float:
    """Return the largest relative difference of loss, norm and clip factor; counts must be equal."""
    assert [trace.counts_LE for trace in ours] == [trace.counts_LE for trace in theirs]
    pairs = [
        (left, right)
        for a, b in zip(ours, theirs, strict=True)
        for left, right in zip(_numbers(a), _numbers(b), strict=True)
    ]
    return max(abs(left - right) / abs(right) for left, right in pairs)


def _numbers(trace: Trace) -> tuple[float, float, float]:
    return trace.loss, trace.report.grad_norm, trace.report.clip_factor


def largest_gap(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Return the largest absolute difference of two states with the same names and shapes."""
    assert ours.keys() == theirs.keys()
    assert all(ours[name].shape == theirs[name].shape for name in ours)
    return max((ours[name].double() - theirs[name].double()).abs().max().item() for name in ours)


def identical(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Return whether two states are the same, bit for bit."""
    same_names = ours.keys() == theirs.keys()
    return same_names and all(
        torch.equal(ours[name].reshape(-1).view(torch.uint8), theirs[name].reshape(-1).view(torch.uint8))
        for name in ours
    )
