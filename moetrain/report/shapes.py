"""JSON Schemas of the stage files that a report reads, so that a damaged file is refused when it is read.

They describe only the fields that are read; other fields are allowed.
"""

from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import jsonschema

from moetrain.errors import DataError

Schema = Mapping[str, Any]
_MAX_MESSAGE = 200  # characters of an error message


def _object(required: Mapping[str, Any] | None = None, **optional: Any) -> dict[str, Any]:
    """Return the schema of an object with these fields; other fields are allowed."""
    needed = dict(required or {})
    return {"type": "object", "required": list(needed), "properties": {**needed, **optional}}


def _each(value: Mapping[str, Any], *, names: str = "") -> dict[str, Any]:
    """Return the schema of an object whose values all have the schema `value`. names: pattern of its keys."""
    return {"type": "object", "additionalProperties": value, "propertyNames": {"pattern": names}}


_TEXT, _NUMBER, _INTEGER, _LIST = ({"type": kind} for kind in ("string", "number", "integer", "array"))
_TEXT_OR_NULL = {"type": ["string", "null"]}
_BYTES = {"type": "integer", "exclusiveMinimum": 0}
_NUMBER_OR_NULL = {"type": ["number", "null"]}  # null stands for NaN: no tasks, or weights that are not finite
_RATE = _object({"value": _NUMBER_OR_NULL, "low": _NUMBER, "high": _NUMBER, "count": _INTEGER})
_DIFFERENCE = _object(
    {"value": _NUMBER, "low": _NUMBER, "high": _NUMBER, "count": _INTEGER},
    gained=_INTEGER,
    lost=_INTEGER,
    p_value=_NUMBER,
)
_MODE = _object(
    {"all": _RATE, "by_calls": _each(_RATE, names="^[0-9]+$"), "after_tool_error": _RATE},
    without_tool_error=_RATE,
    endings=_each(_INTEGER),
    grades=_each(_INTEGER),
    outcomes=_each({"type": "boolean"}),
    hazard={
        "type": "array",
        "items": _object({"from": _NUMBER, "to": _NUMBER_OR_NULL, "value": _NUMBER, "low": _NUMBER, "high": _NUMBER}),
    },
    mean_segments=_NUMBER,
    mean_sampled_tokens=_NUMBER,
    mean_calls=_NUMBER,
)
_PARAMETERS = _object({"total": _INTEGER, "active_with_head": _INTEGER, "routed": _INTEGER})
_EXPORT_SIZES = {"num_bytes": _BYTES, "num_bytes_bf16": _BYTES}

CONFIG_SHAPE: Schema = _object(
    run=_object(folder=_TEXT, name=_TEXT, stage=_TEXT),
    init_from=_TEXT_OR_NULL,
    continue_from=_TEXT_OR_NULL,
    eval=_object(before=_TEXT_OR_NULL, codes_before=_TEXT_OR_NULL),
)
"""`config.yaml`, without sections that the page only prints: `model` is a string in the config of `verify faults`."""
SUMMARY_SHAPE: Schema = {
    **_object(
        validation=_each(
            _object(
                {"nats_per_character": _NUMBER_OR_NULL, "characters": _INTEGER, "targets": _INTEGER},
                bigram_nats_per_character={"type": ["number", "null"]},
            )
        ),
        parameters={"anyOf": [_PARAMETERS, _object({"dense": _PARAMETERS, "sparse": _PARAMETERS})]},  # of `upcycle`
        digests=_object(),
        vocabulary=_object(rows=_INTEGER),
        tokens=_NUMBER,
        sampled_tokens=_NUMBER,
        time=_object(tokens_per_s=_NUMBER_OR_NULL),
        **_EXPORT_SIZES,
    ),
    "dependentRequired": {"num_bytes": ["num_bytes_bf16"]},
}
"""`summary.json`."""
EVALUATION_SHAPE: Schema = _object(
    {"modes": _each(_MODE)},
    masters=_each(_object({"all": _RATE}, after_tool_error=_RATE)),
    paired=_each(_DIFFERENCE),
    graders=_object(
        {"null_policy": _NUMBER, "num_tasks": _INTEGER}, perfect_demonstrator=_NUMBER, perfect_expert=_NUMBER
    ),
    trained_calls={"type": "array", "items": _INTEGER},
    task=_object({"name": _TEXT, "tools": _each(_TEXT)}),
    language=_each(_NUMBER_OR_NULL),
    divergence=_object(
        {**dict.fromkeys(("mean_kl", "max_kl", "top1_changed"), _NUMBER_OR_NULL), "num_tokens": _INTEGER}
    ),
    digests=_object(),
    weights_format=_TEXT,
    code_changes=_object({"code_flip_rate": _NUMBER, "scale_change_rate": _NUMBER}),
    export=_object({"bytes": _BYTES, "bf16_bytes": _BYTES}),
)
"""`eval.json`."""
EXPORT_SHAPE: Schema = _object(report=SUMMARY_SHAPE, sha256=_TEXT)
"""`model/moetrain.json`."""
VERIFICATION_SHAPE: Schema = _object(
    {
        "rows": {
            "type": "array",
            "items": _object(
                {"name": _TEXT, "value": _NUMBER, "bound": _NUMBER, "is_kept": {"type": "boolean"}, "note": _TEXT}
            ),
        }
    }
)
"""`verify.json`."""
MADE_BY_SHAPE: Schema = _object(
    **dict.fromkeys(("moetrain", "commit", "torch", "started", "processor", "device"), _TEXT_OR_NULL),
    **dict.fromkeys(("cores", "ranks", "memory_gib", "peak_memory_gib", "peak_device_memory_gib"), _NUMBER_OR_NULL),
)
"""`made_by.json`."""
DONE_SHAPE: Schema = _object({}, seconds=_NUMBER, made_by=_TEXT)
"""`done.json`."""
TRACE_SHAPE: Schema = _object(
    {
        "text": _TEXT,
        "grade": _object({"success": {}, "reason": _TEXT}),
        "ending": _TEXT,
        "segments": {"type": "array", "items": _object({"tokens": _LIST, "is_sampled": _LIST})},
        "num_calls_needed": {"type": ["integer", "null"]},
        **dict.fromkeys(("task", "num_calls", "num_turns", "num_transient_errors"), _INTEGER),
    }
)
"""A line of `traces/*.jsonl`."""


def validated(content: Any, shape: Schema, *, place: Path | str) -> dict[str, Any]:
    """Return `content`, read from `place`. Raises DataError that names the first field that does not fit the schema."""
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(shape).iter_errors(content))
    if error is None:
        result: dict[str, Any] = content
        return result
    field = ".".join(str(part) for part in error.absolute_path)
    reason = shorten(error.message, _MAX_MESSAGE, placeholder=" ...")
    raise DataError(f"{place}: {field + ': ' if field else ''}{reason}; the file is damaged: run its stage again")


def validated_metrics(rows: list[dict[str, Any]], *, place: Path) -> list[dict[str, Any]]:
    """Return the rows of `metrics.jsonl` without null values, which stand for NaN and infinity.

    Raises DataError that names a value that is not a number.
    """
    for row in rows:
        for name, value in row.items():
            if not isinstance(value, int | float | None):
                raise DataError(f"{place}: step {row['step']}: {name} is not a number; the file is damaged: repair it")
    return [{name: value for name, value in row.items() if value is not None} for row in rows]
