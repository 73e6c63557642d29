"""From the training engine to generation weights: the same codes and scales that training multiplied with."""

import torch

from moetrain.inference.weights import InferenceWeights, build_weights
from moetrain.model.config import ModelConfig
from moetrain.parallel.engine import Engine
from moetrain.quant.config import QuantConfig


def sync_weights(
    engine: Engine, *, config: ModelConfig, quant: QuantConfig, dtype: torch.dtype = torch.bfloat16
) -> InferenceWeights:
    """Return the engine's present weights for generation, on every rank. Collective."""
    tensors = engine.topology.broadcast_object(engine.gather_state(with_optimizer=False))
    assert tensors is not None
    return build_weights(tensors, config=config, quant=quant, dtype=dtype, device=engine.topology.device)
