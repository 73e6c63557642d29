"""Parses the JSON arguments of a tool call and checks them against the tool's schema."""

import functools
import json
from typing import Any

import jsonschema

from moetrain.chat.messages import valid_text
from moetrain.chat.tool_schema import ToolSpec
from moetrain.errors import ToolError
from moetrain.files import strict_json

_SHOWN = 40  # characters of a bad value that an error message repeats


def parse_arguments(spec: ToolSpec, text: str) -> dict[str, Any]:
    """Return the arguments of a call, checked against the tool's schema. Raises ToolError with the reason."""
    try:
        arguments = strict_json(text)
        if "\\u" in text:  # an escape can produce a lone surrogate, which databases and files refuse
            arguments = json.loads(valid_text(json.dumps(arguments, ensure_ascii=False), field="arguments"))
    except json.JSONDecodeError as error:
        raise ToolError(f"arguments are not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of open brackets
        raise ToolError(f"arguments are not JSON that can be read: {str(error)[: 2 * _SHOWN]}") from None
    problem = next(_validator(json.dumps(spec.parameters)).iter_errors(arguments), None)
    if problem is not None:
        raise ToolError(problem.message[: 2 * _SHOWN])
    if not isinstance(arguments, dict):
        raise ToolError("arguments are not a JSON object")
    return arguments


@functools.lru_cache(maxsize=256)
def _validator(schema: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads(schema))
