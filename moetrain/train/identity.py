"""What identifies a training run: two runs of one identity compute the same numbers.

Layout and bookkeeping are left out: the number of ranks, micro-batches, how often to log or to save change no number.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from moetrain.checkpoint.identity import as_kept
from moetrain.model.config import ModelConfig
from moetrain.optim.config import OptimConfig
from moetrain.quant.config import QuantConfig
from moetrain.train.config import TrainConfig

_OF_TRAIN = ("steps", "rows_per_step", "batch_ramp", "compute_dtype", "continue_as")
"""Fields of the section `train` that change numbers; a stage has those that its schema has."""


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
    """Return the identity of a training run. origin: digest of the weights it starts from. others: sections of its own.

    Paths are left out wherever they stand: a digest says what they hold, and a folder may be moved. So are
    micro-batches. Infinity, which a threshold may be and JSON has not, is the string "inf".
    """
    sections = {
        "model": asdict(model),
        "quant": asdict(quant),
        "optim": asdict(optim),
        "train": {name: value for name, value in asdict(train).items() if name in _OF_TRAIN},
        "seed": seed,
        "origin": origin,
        **others,
    }
    return as_kept(sections)
