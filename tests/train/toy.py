"""A toy model, its batches and its engines: what the tests of this folder share."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from moetrain.data.batch import WEIGHT, TokenBatch, concatenated
from moetrain.model.config import BalanceConfig, ModelConfig
from moetrain.optim.config import OptimConfig, ScheduleConfig
from moetrain.optim.schedule import learning_rate
from moetrain.parallel.config import EngineName, ParallelConfig
from moetrain.parallel.engine import build_engine
from moetrain.parallel.protocol import Engine
from moetrain.quant.config import QuantConfig
from moetrain.runtime import torch_stream
from moetrain.train.document_stage import DocumentStage
from moetrain.train.loss import language_model_objective

ROWS, SEQ_LEN = 4, 24


def toy_model(balance: BalanceConfig | None = None) -> ModelConfig:
    return ModelConfig(
        vocab_size=67,
        hidden_size=32,
        num_layers=3,
        num_heads=2,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        intermediate_size=48,
        moe_intermediate_size=32,
        num_experts=4,
        max_position_embeddings=64,
        balance=balance or BalanceConfig(sequence_loss=1e-2),
    )


def toy_batch(step: int, *, rows: int = ROWS, seed: int = 0) -> TokenBatch:
    """Return rows of two documents and some padding; some tokens are not predicted, weights differ."""
    stream = torch_stream(seed, "toy", step)
    tokens_BT = torch.randint(1, 67, (rows, SEQ_LEN), generator=stream)
    tokens_BT[:, 2::2] = tokens_BT[:, 1:-1:2]  # something to learn: each second token repeats the one before it
    segments_BT = torch.ones(rows, SEQ_LEN, dtype=torch.int64)
    segments_BT[:, 10:] = 2
    segments_BT[:, 21:] = 0
    positions_BT = torch.arange(SEQ_LEN).repeat(rows, 1)
    positions_BT[:, 10:] -= 10
    loss_mask_BT = (segments_BT > 0) & (positions_BT > 0) & (torch.rand(rows, SEQ_LEN, generator=stream) < 0.8)
    weights_BT = 0.5 + torch.rand(rows, SEQ_LEN, generator=stream)
    return TokenBatch(
        tokens_BT=tokens_BT,
        segments_BT=segments_BT,
        positions_BT=positions_BT,
        loss_mask_BT=loss_mask_BT,
        columns={WEIGHT: weights_BT},
    )


def one_document_per_row(batch: TokenBatch) -> TokenBatch:
    """Return the same documents, each at the beginning of a row of its own."""
    rows = []
    for row in range(len(batch.tokens_BT)):
        for segment in range(1, int(batch.segments_BT[row].max()) + 1):
            rows.append(_alone(batch.rows(row, row + 1), segment=segment))
    return concatenated(rows)


def _alone(row: TokenBatch, *, segment: int) -> TokenBatch:
    place_T = row.segments_BT[0] == segment
    num_missing = int((~place_T).sum())
    moved = row.map(lambda column: torch.nn.functional.pad(column[:, place_T], (0, num_missing)))
    return replace(moved, segments_BT=(moved.segments_BT > 0).long())


def toy_engine(
    *,
    engine: EngineName = EngineName.torch,
    compute_dtype: torch.dtype = torch.float32,
    quantised: bool = False,
    seed: int = 0,
    balance: BalanceConfig | None = None,
) -> Engine:
    return build_engine(
        toy_model(balance),
        ParallelConfig(engine=engine),
        optim_config=OptimConfig(lr=1e-2),
        quant_config=QuantConfig(enabled=quantised, group_size=32),
        compute_dtype=compute_dtype,
        seed=seed,
    )


def toy_stage(
    engine: Engine, *, steps: int, batch_at: Callable[[int], TokenBatch] = toy_batch, identity: str = "toy"
) -> DocumentStage:
    schedule = ScheduleConfig(warmup_steps=2)
    balance = BalanceConfig(sequence_loss=1e-2)
    return DocumentStage(
        engine=engine,
        objective_at=lambda step: lambda counts: language_model_objective(counts, balance=balance),
        batch_at=batch_at,
        num_rows_at=lambda step: ROWS,
        learning_rate=lambda step: learning_rate(step, steps, lr=1e-2, schedule=schedule),
        mix_at=lambda step: 0,
        balance=BalanceConfig(),
        validate=lambda: {"validation/toy": 1.0},
        position=lambda step: {"rows_read": step},
        identity={"name": identity},
        flops_per_token=1e6,
        peak_flops=1e11,
    )


def losses(path: Path) -> list[float]:
    """Return the losses in a metrics file, in order of steps."""
    from moetrain.log import read_metrics

    return [row["loss"] for row in read_metrics(path) if "loss" in row]
