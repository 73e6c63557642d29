"""Validation loss on held-out rows per source, in nats per character, which is comparable across tokenizers."""

from collections.abc import Mapping

import torch

from moetrain.data.batch import TokenBatch
from moetrain.data.packing import ValidationRows
from moetrain.model.transformer import Transformer
from moetrain.parallel.protocol import Engine
from moetrain.train.loss import token_logprobs
from moetrain.train.rows import rank_rows, split_rows


def validate(engine: Engine, held_out: Mapping[str, ValidationRows], *, rows_per_micro_batch: int) -> dict[str, float]:
    """Return `validation/<source>` in nats per character for each source. Collective; the same on every rank."""
    nats = [total_nats(engine, source.batch, rows_per_micro_batch=rows_per_micro_batch) for source in held_out.values()]
    return {
        f"validation/{name}": total / source.num_characters
        for (name, source), total in zip(held_out.items(), nats, strict=True)
    }


def total_nats(engine: Engine, batch: TokenBatch, *, rows_per_micro_batch: int) -> float:
    """Return the negative log-likelihood of a global batch's predicted tokens in nats, unweighted. Collective."""
    topology = engine.topology
    rows = rank_rows(batch, rank=topology.rank, world_size=topology.world_size)
    nats = torch.zeros((), dtype=torch.float64)
    for part in split_rows(rows, rows=rows_per_micro_batch):
        nats += engine.inspect(_nats, part).cpu()
    return float(topology.all_reduce_sum(nats))


def _nats(model: Transformer, batch: TokenBatch) -> torch.Tensor:
    output = model(batch.tokens_BT, segments_BT=batch.segments_BT, positions_BT=batch.positions_BT)
    return -token_logprobs(model, output.hidden_BTD, batch=batch).logprobs_N.double().sum()
