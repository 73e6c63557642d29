"""Reads rotary parameters of a config.json, in the forms of transformers 4 and 5. Imports no torch or transformers."""

from collections.abc import Mapping
from typing import Any

from moetrain.errors import CheckpointError
from moetrain.model.config import YarnConfig

_SCALING, _PARAMETERS, _THETA = "rope_scaling", "rope_parameters", "rope_theta"
_DEFAULT_THETA = 10000.0  # transformers' default
_REQUIRED = ("factor", "original_max_position_embeddings", "mscale", "mscale_all_dim")
_OPTIONAL = {"beta_fast": 32.0, "beta_slow": 1.0}
_WITHOUT_EFFECT = {"attention_factor": None, "truncate": True}
"""Other keys that transformers reads, with the values that change nothing."""


def read_rope(values: Mapping[str, Any]) -> tuple[float, YarnConfig]:
    """Return rope_theta and the YaRN parameters of a config.json; without them, transformers' defaults.

    Raises CheckpointError when two fields contradict each other, and for a parameter that is not computed.
    """
    scaling, parameters = _section(values, _SCALING), _section(values, _PARAMETERS)
    if scaling and parameters and _without_theta(scaling) != _without_theta(parameters):
        raise CheckpointError(
            f"config.json: {_SCALING} and {_PARAMETERS} differ ({_without_theta(scaling)} and "
            f"{_without_theta(parameters)}): remove one of them"
        )
    name, rope = (_PARAMETERS, parameters) if parameters else (_SCALING, scaling)
    stated = [section[_THETA] for section in (values, scaling, parameters) if section.get(_THETA) is not None]
    if len(set(map(str, stated))) > 1 and len({_number(each, name=_THETA) for each in stated}) > 1:
        raise CheckpointError(f"config.json: {_THETA} is {stated[0]} and, in {name}, {stated[1]}: remove one of them")
    theta = _number(stated[0], name=_THETA) if stated else _DEFAULT_THETA
    return theta, _yarn_of(_without_theta(rope), name=name)


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name)
    if section is not None and not isinstance(section, Mapping):
        raise CheckpointError(f"config.json: {name} is {section!r}: give an object with rope_type and its parameters")
    return section or {}


def _without_theta(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters but rope_theta, and the kind as `rope_type` only (transformers 4 wrote `type`)."""
    kinds = [rope[key] for key in ("rope_type", "type") if key in rope]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise CheckpointError(f"config.json: rope_type is {kinds[0]!r} and type {kinds[1]!r}: remove one of them")
    rest = {key: value for key, value in rope.items() if key not in ("rope_type", "type", _THETA)}
    return {"rope_type": kinds[0], **rest} if kinds else rest


def _yarn_of(rope: Mapping[str, Any], *, name: str) -> YarnConfig:
    """Return the YaRN parameters of `rope` (without rope_theta), the section `name` of config.json."""
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "yarn"):
        raise CheckpointError(f"config.json: rope_type is {kind!r}: only default and yarn are supported")
    known = {"rope_type", *((*_REQUIRED, *_OPTIONAL) if kind == "yarn" else ())}
    for key, value in rope.items():
        if key not in known and not (key in _WITHOUT_EFFECT and value == _WITHOUT_EFFECT[key]):
            stated = f"with rope_type {kind}" if "rope_type" in rope else "without rope_type"
            raise CheckpointError(f"config.json: {name} has {key} ({value!r}) {stated}, which is not read: remove it")
    if kind == "default":
        return YarnConfig()
    for key in _REQUIRED:
        if not rope.get(key):
            raise CheckpointError(f"config.json: {key} of the yarn parameters is missing or 0: yarn requires it")
    numbers = {key: _number(rope[key], name=key) for key in _REQUIRED}
    numbers |= {key: _number(rope.get(key) or default, name=key) for key, default in _OPTIONAL.items()}
    length = numbers.pop("original_max_position_embeddings")
    if not length.is_integer():
        raise CheckpointError(f"config.json: original_max_position_embeddings is {length}: give a whole number")
    return YarnConfig(original_max_position=int(length), **numbers)


def _number(value: Any, *, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"config.json: {name} is {value!r}: give a number")
    return float(value)
