"""The identity of a run as JSON: stored in its checkpoints, compared when resuming, and converted back to configs."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from moetrain.config_keys import as_typed
from moetrain.model.config import BalanceConfig, BiasRule, ModelConfig, ScoreFunction, YarnConfig
from moetrain.quant.config import QuantConfig, quant_config

_LEFT_OUT = ("path", "tokens_per_micro_batch", "shrink_model", "num_slots", "cache_megabytes", "speculation")


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
    return quant_config(identity["quant"])


def upgraded(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity with the fields that older versions did not write, set to the values used at the time."""
    fields = dict(identity)
    if "model" in fields:
        fields["model"] = {"num_mtp_layers": 0, **fields["model"]}
    if "quant" in fields:
        fields["quant"] = asdict(quant_of(identity))
    if "data" in fields:
        fields["data"] = _upgraded_data(fields["data"])
    return fields


def _upgraded_data(data: Mapping[str, Any]) -> dict[str, Any]:
    fields = dict(data)
    if "tokenizer" in fields:
        fields["tokenizer"] = {"template": "auto", **fields["tokenizer"]}
    if "sources" in fields:
        fields["sources"] = {name: {"unreadable": "refuse", **source} for name, source in fields["sources"].items()}
    return fields


def differences(before: Mapping[str, Any], now: Mapping[str, Any], *, prefix: str = "") -> list[str]:
    """Return one line "field: before -> now" for each leaf that differs between two nested mappings."""
    lines: list[str] = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, prefix=f"{prefix}{key}.")
        elif old != new and prefix == "digests.":
            lines.append(f"the content of data.sources.{key} changed")
        elif old != new:
            lines.append(f"{prefix}{key}: {as_typed(old)} -> {as_typed(new)}")
    return lines


def as_stored(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping without fields that do not affect results, and with non-finite floats as strings.

    At every depth, it leaves out paths, micro-batch sizes, how generation shares the memory, and `shrink_model`, whose
    effect is `model.vocab_size`.
    """
    return {name: _stored_value(value) for name, value in mapping.items() if name not in _LEFT_OUT}


def _stored_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return as_stored(value)
    if isinstance(value, list | tuple):
        return [_stored_value(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
