"""Language modelling loss of exported weights: nats per character on the validation rows of each source."""

from collections.abc import Mapping

import torch

from moetrain.data.packing import ValidationRows
from moetrain.model.config import ModelConfig
from moetrain.model.transformer import Transformer
from moetrain.parallel.protocol import on_device
from moetrain.runtime import default_device
from moetrain.train.loss import token_logprobs
from moetrain.train.rows import split_rows

_ROWS = 8


@torch.no_grad()
def nats_per_character(
    tensors: Mapping[str, torch.Tensor], config: ModelConfig, *, validation: Mapping[str, ValidationRows]
) -> dict[str, float]:
    """Return nats per character by source. tensors: weights by their names in training. Products are in bf16."""
    model = Transformer(config, compute_dtype=torch.bfloat16)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    device = default_device()
    model.to(device)
    results = {}
    for name, rows in validation.items():
        nats = 0.0
        for part in split_rows(rows.batch, rows=_ROWS):
            part = on_device(part, device)
            output = model(part.tokens_BT, segments_BT=part.segments_BT, positions_BT=part.positions_BT)
            nats -= float(token_logprobs(model, output.hidden_BTD, batch=part).logprobs_N.double().sum())
        results[name] = nats / rows.num_characters
    return results
