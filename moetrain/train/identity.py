"""What makes a run the run it is, as JSON: kept in its checkpoints, compared on resuming, read by what comes after.

Layout and bookkeeping are left out: the number of ranks, micro-batches, how often to log or to save change no number.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from moetrain.model.config import BalanceConfig, BiasRule, ModelConfig, ScoreFunction, YarnConfig
from moetrain.optim.config import OptimConfig
from moetrain.quant.config import GridName, QuantConfig
from moetrain.train.config import TrainConfig

_OF_TRAIN = ("steps", "rows_per_step", "batch_ramp", "compute_dtype")


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

    Paths are left out wherever they stand: a digest says what they hold, and a folder may be moved. Infinity, which a
    threshold may be and JSON has not, is the string "inf".
    """
    sections = {
        "model": asdict(model),
        "quant": asdict(quant),
        "optim": asdict(optim),
        "train": {name: asdict(train)[name] for name in _OF_TRAIN},
        "seed": seed,
        "origin": origin,
        **others,
    }
    return {name: _as_kept(section) for name, section in sections.items()}


def model_of(identity: Mapping[str, Any]) -> ModelConfig:
    """Return the model section of an identity as a config."""
    fields = dict(identity["model"])
    balance = dict(fields.pop("balance"))
    return ModelConfig(
        score_function=ScoreFunction(fields.pop("score_function")),
        yarn=YarnConfig(**fields.pop("yarn")),
        balance=BalanceConfig(bias_rule=BiasRule(balance.pop("bias_rule")), **balance),
        **fields,
    )


def quant_of(identity: Mapping[str, Any]) -> QuantConfig:
    """Return the quantisation section of an identity as a config."""
    fields = dict(identity["quant"])
    return QuantConfig(grid=GridName(fields.pop("grid")), **fields)


def _as_kept(value: Any) -> Any:
    """Return a value without the paths in it, and its numbers that JSON has not as strings."""
    if isinstance(value, Mapping):
        return {name: _as_kept(inner) for name, inner in value.items() if name != "path"}
    if isinstance(value, list | tuple):
        return [_as_kept(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
