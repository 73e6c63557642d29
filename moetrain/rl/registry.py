"""RL algorithms by name. A plugin calls `register`, and a stage calls `build`."""

from collections.abc import Callable, Mapping
from dataclasses import fields

from moetrain.errors import ConfigError
from moetrain.rl.algorithms.k2_5 import K25
from moetrain.rl.algorithms.rejection import Rejection
from moetrain.rl.columns import COLUMNS
from moetrain.rl.config import RlConfig
from moetrain.rl.protocol import Algorithm

_ALGORITHMS: dict[str, Callable[..., Algorithm]] = {"k2_5": K25, "rejection": Rejection}


def register(name: str, algorithm: Callable[..., Algorithm]) -> None:
    """Register the dataclass `algorithm` as `rl.algorithm=name`. `rl.options.<field>=<number>` sets its fields."""
    _ALGORITHMS[name] = algorithm


def registered() -> Mapping[str, Callable[..., Algorithm]]:
    """Return the algorithms by name."""
    return dict(_ALGORITHMS)


def build(config: RlConfig) -> Algorithm:
    """Return the algorithm that `config` names, with its options. Raises ConfigError that names the field."""
    if config.algorithm not in _ALGORITHMS:
        known = ", ".join(sorted(_ALGORITHMS))
        raise ConfigError(f"rl.algorithm is {config.algorithm}: give one of {known}, or a plugin that registers it")
    algorithm = _ALGORITHMS[config.algorithm]
    known_options = [option.name for option in fields(algorithm)]  # type: ignore[arg-type]
    for option in config.options:
        if option not in known_options:
            has = f"has the options {', '.join(known_options)}" if known_options else "has no options"
            raise ConfigError(f"rl.options.{option}: rl.algorithm={config.algorithm} {has}")
    built = algorithm(**config.options)
    for column in built.columns:
        if column not in COLUMNS:
            raise ConfigError(
                f"rl.algorithm={config.algorithm} requests the column {column!r}: give one of {', '.join(COLUMNS)}"
            )
    return built
