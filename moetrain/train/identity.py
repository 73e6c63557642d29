"""The identity of a training run: two runs with equal identity compute the same numbers.

Layout and bookkeeping are excluded: ranks, micro-batches, and the intervals of logging and saving change no number.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from moetrain.checkpoint.identity import as_stored
from moetrain.model.config import ModelConfig
from moetrain.optim.config import OptimConfig
from moetrain.quant.config import QuantConfig
from moetrain.train.config import TrainConfig

_OF_TRAIN = ("steps", "rows_per_step", "batch_ramp", "compute_dtype", "continue_as", "mtp")
"""Fields of the section `train` that change numbers; fields that a stage's schema lacks are ignored."""


def identity_of(
    *,
    model: ModelConfig,
    quant: QuantConfig,
    optim: OptimConfig,
    train: TrainConfig,
    seed: int,
    origin: str | None,
    others: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the identity of a training run. origin: digest of the initial weights. others: further sections of the
    stage.

    Paths are excluded at every depth, because a folder may be moved; digests identify the content. Micro-batch sizes
    are excluded too. Infinity, a valid threshold that JSON cannot express, becomes the string "inf".
    """
    of_train = {name: value for name, value in asdict(train).items() if name in _OF_TRAIN}
    if not model.num_mtp_layers:
        of_train.pop("mtp", None)
    sections = {
        "model": asdict(model),
        "quant": asdict(quant),
        "optim": asdict(optim),
        "train": of_train,
        "seed": seed,
        "origin": origin,
        **others,
    }
    return as_stored(sections)
