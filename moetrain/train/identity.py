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

_LEFT_OUT = ("path", "tokens_per_micro_batch")
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

    Paths are left out wherever they stand: a digest says what they hold, and a folder may be moved. So are
    micro-batches. Infinity, which a threshold may be and JSON has not, is the string "inf".
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
    return as_kept(sections)


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


def as_kept(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping without the paths and micro-batches in it, its numbers that JSON has not as strings."""
    return {name: _kept(value) for name, value in mapping.items() if name not in _LEFT_OUT}


def _kept(value: Any) -> Any:
    if isinstance(value, Mapping):
        return as_kept(value)
    if isinstance(value, list | tuple):
        return [_kept(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
