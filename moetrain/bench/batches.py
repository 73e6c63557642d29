"""Batches of random tokens for benchmarks of training."""

import torch

from moetrain.data.batch import TokenBatch
from moetrain.runtime import torch_stream


def zipf_batch(*, vocab_size: int, rows: int, seq_len: int, seed: int, step: int) -> TokenBatch:
    """Return the rows of a step: random tokens with Zipf frequencies (1 / token id + 1), one document per row."""
    shape = (rows, seq_len)
    frequency_V = 1.0 / torch.arange(1, vocab_size + 1, dtype=torch.float64)
    stream = torch_stream(seed, "bench/tokens", step)
    tokens = torch.multinomial(frequency_V, rows * seq_len, replacement=True, generator=stream)
    positions_BT = torch.arange(seq_len).expand(shape)
    return TokenBatch(
        tokens_BT=tokens.view(shape),
        segments_BT=torch.ones(shape, dtype=torch.int64),
        positions_BT=positions_BT,
        loss_mask_BT=positions_BT > 0,
    )
