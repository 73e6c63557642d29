"""RL algorithms by name. A plugin calls `register`, and a stage calls `build`."""

from collections.abc import Mapping
from dataclasses import is_dataclass

from moetrain.errors import ConfigError
from moetrain.options import checked_options
from moetrain.rl.algorithms.k2_5 import K25
from moetrain.rl.algorithms.rejection import Rejection
from moetrain.rl.columns import COLUMNS
from moetrain.rl.config import RlConfig
from moetrain.rl.protocol import Algorithm, Normalizer

_ALGORITHMS: dict[str, type[Algorithm]] = {"k2_5": K25, "rejection": Rejection}
_OWN = frozenset(_ALGORITHMS)
_MEMBERS = ("columns", "normalizer", "advantages", "token_loss")


def register(name: str, algorithm: type[Algorithm]) -> None:
    """Register the dataclass `algorithm` as `rl.algorithm=name`. `rl.options.<field>=<value>` sets its fields.

    Raises ConfigError if it is not a dataclass, or if moetrain has an algorithm of this name.
    """
    if name in _OWN:
        raise ConfigError(f"a plugin registers the RL algorithm {name}, which moetrain has: give another name")
    if not is_dataclass(algorithm):
        raise ConfigError(f"the RL algorithm {name} is {algorithm!r}: give a class with @dataclass(kw_only=True)")
    _ALGORITHMS[name] = algorithm


def registered() -> Mapping[str, type[Algorithm]]:
    """Return the algorithms by name."""
    return dict(_ALGORITHMS)


def build(config: RlConfig) -> Algorithm:
    """Return the algorithm that `config` names, with its options. Raises ConfigError that names the field."""
    if config.algorithm not in _ALGORITHMS:
        known = ", ".join(sorted(_ALGORITHMS))
        raise ConfigError(f"rl.algorithm is {config.algorithm}: give one of {known}, or a plugin that registers it")
    owner = f"rl.algorithm={config.algorithm}"
    built: Algorithm = checked_options(_ALGORITHMS[config.algorithm], config.options, prefix="rl.options.", owner=owner)
    for member in _MEMBERS:
        if member not in dir(built):
            raise ConfigError(f"{owner} has no {member}: an algorithm has {', '.join(_MEMBERS)}")
    if built.normalizer not in list(Normalizer):
        raise ConfigError(f"{owner} has the normalizer {built.normalizer!r}: give one of {', '.join(Normalizer)}")
    if isinstance(built.columns, str):
        raise ConfigError(f"{owner} has the columns {built.columns!r}: give a tuple, such as ({built.columns!r},)")
    for column in built.columns:
        if column not in COLUMNS:
            raise ConfigError(f"{owner} requests the column {column!r}: give one of {', '.join(COLUMNS)}")
    return built
