"""Reads `quantization_config` of a released folder: which kinds of quantised matrices its files may contain.

Two methods are read: FP8 in blocks (DeepSeek-V3, Kimi K2) and the formats of `quant.formats` in the layout of
compressed-tensors (Kimi K2 Thinking). Which tensor is quantised is decided by the tensors that are present.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moetrain.errors import CheckpointError, ConfigError
from moetrain.hf.shape import text_config
from moetrain.quant.config import LIMITS, FormatName, QuantConfig
from moetrain.quant.formats import FORMATS

KEY = "quantization_config"
_FP8, _COMPRESSED = "fp8", "compressed-tensors"
_PATTERN = "re:"


@dataclass(frozen=True, kw_only=True)
class Fp8Blocks:
    """FP8 e4m3 weights with a scale for each block of (rows, columns)."""

    block: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class PackedGroups:
    """Packed codes in a format of `quant.formats`, with a scale for each group of inputs.

    ignore: modules that are not packed, as names, or as patterns after `re:` that match from the start of a name.
    """

    format: FormatName
    group_size: int
    ignore: tuple[str, ...]

    @property
    def quant(self) -> QuantConfig:
        """Config with which the codes can be trained further, on the first grid that the format stores."""
        grid = LIMITS[self.format].grids[0]
        return QuantConfig(enabled=True, format=self.format, grid=grid, group_size=self.group_size)

    def ignores(self, module: str) -> bool:
        """Return whether the list of ignored modules names `module`."""
        return any(
            re.match(entry.removeprefix(_PATTERN), module) is not None
            if entry.startswith(_PATTERN)
            else entry == module
            for entry in self.ignore
        )


Quantization = Fp8Blocks | PackedGroups


def quantization_of(values: Mapping[str, Any]) -> Quantization | None:
    """Return how the weights of a config.json are quantised; None if it states nothing.

    values: content of config.json; the section is at its top or under `text_config`. Raises CheckpointError for a
    method or a setting that is not read.
    """
    inner, outer = text_config(values).get(KEY), values.get(KEY)
    if inner and outer and inner != outer:
        raise CheckpointError(f"config.json: {KEY} differs at the top and in text_config: remove one of them")
    stated = inner or outer
    if not stated:
        return None
    if not isinstance(stated, Mapping):
        raise CheckpointError(f"config.json: {KEY} is {stated!r}: give an object")
    method = stated.get("quant_method")
    if method == _FP8:
        return _fp8(stated)
    if method == _COMPRESSED:
        return _packed(stated)
    raise CheckpointError(
        f"config.json: {KEY}.quant_method is {method!r}: {_FP8} (e4m3 in blocks) and {_COMPRESSED} are read; give the "
        "bf16 weights"
    )


def _fp8(stated: Mapping[str, Any]) -> Fp8Blocks:
    if stated.get("fmt", "e4m3") != "e4m3":
        raise CheckpointError(f"config.json: {KEY}.fmt is {stated['fmt']!r}: only e4m3 is read")
    block = stated.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
        raise CheckpointError(
            f"config.json: {KEY}.weight_block_size is {block!r}: only scales of blocks, such as [128, 128], are read"
        )
    return Fp8Blocks(block=(block[0], block[1]))


def _packed(stated: Mapping[str, Any]) -> PackedGroups:
    names = {row.compression: name for name, row in FORMATS.items()}
    if stated.get("format") not in list(names):  # a list, because the value may be anything
        raise CheckpointError(
            f"config.json: {KEY}.format is {stated.get('format')!r}: {', '.join(names)} are read; give the bf16 weights"
        )
    name = names[stated["format"]]
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if stated.get(key):
            raise CheckpointError(
                f"config.json: {KEY}.{key} is set: only quantisation of weights is supported; give the bf16 weights"
            )
    groups = stated.get("config_groups")
    group = next(iter(groups.values())) if isinstance(groups, Mapping) and len(groups) == 1 else None
    if not isinstance(group, Mapping):
        raise CheckpointError(f"config.json: {KEY}.config_groups is {groups!r}: give exactly one group")
    if group.get("input_activations") or group.get("output_activations"):
        raise CheckpointError(
            f"config.json: {KEY} quantises activations: only quantisation of weights is supported; give the bf16 "
            "weights"
        )
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"config.json: {KEY}: weights is {weights!r}: give an object")
    _check_weights(weights, name)
    ignore = stated.get("ignore") or []
    if not isinstance(ignore, list) or not all(isinstance(entry, str) for entry in ignore):
        raise CheckpointError(f"config.json: {KEY}.ignore is {ignore!r}: give a list of names and patterns")
    for entry in ignore:
        _check_pattern(entry)
    packed = PackedGroups(format=name, group_size=weights["group_size"], ignore=tuple(ignore))
    try:
        packed.quant  # noqa: B018 - checks the group size
    except ConfigError as error:
        raise CheckpointError(f"config.json: {KEY}: {error}") from error
    return packed


def _check_weights(weights: Mapping[str, Any], name: FormatName) -> None:
    """Raise CheckpointError when codes of these settings are not those of the format."""
    for key in ("num_bits", "type", "symmetric", "strategy"):
        required = FORMATS[name].weights[key]
        if weights.get(key) != required:
            raise CheckpointError(
                f"config.json: {KEY}: {key} of the weights is {weights.get(key)!r}: only {required!r} is read"
            )
    if weights.get("actorder") not in (None, False, "static", "weight"):  # these permute nothing on disk
        raise CheckpointError(
            f"config.json: {KEY}: actorder is {weights['actorder']!r}: columns in another order are not read"
        )
    if not isinstance(weights.get("group_size"), int):
        raise CheckpointError(f"config.json: {KEY}: group_size is {weights.get('group_size')!r}: give a whole number")


def _check_pattern(entry: str) -> None:
    if entry.startswith(_PATTERN):
        try:
            re.compile(entry.removeprefix(_PATTERN))
        except re.error as error:
            raise CheckpointError(f"config.json: {KEY}.ignore: {entry!r} is no regular expression ({error})") from error
