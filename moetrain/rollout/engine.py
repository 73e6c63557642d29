"""Makes the generation that trajectories are collected with, from the settings in `rollout`."""

from moetrain.inference.engine import GenerationEngine
from moetrain.inference.protocol import Generation, Model
from moetrain.rollout.config import RolloutConfig


def make_generation(model: Model, config: RolloutConfig, *, num_sequences: int, version: int = 0) -> Generation:
    """Return a generation with the weights of `model`.

    num_sequences: most sequences that are decoded at the same time; `config.num_slots` also limits them. version: the
    version of the weights that each sampled token gets.
    """
    return GenerationEngine(
        model,
        num_slots=max(min(config.num_slots, num_sequences), 1),
        max_tokens=config.max_tokens,
        version=version,
        cache_megabytes=config.cache_megabytes,
        speculation=config.speculation,
    )
