"""Reads ranges of flattened tensors from safetensors files; only the rows that contain them are read."""

import math
from typing import Any

import torch


def flat_range(stored: Any, *, first: int, last: int) -> torch.Tensor:
    """Return the elements [first, last), in row-major order, of a slice of `safe_open(...).get_slice`, in its dtype."""
    shape = stored.get_shape()
    if not shape:
        return torch.as_tensor(stored[...]).reshape(1)[first:last]
    row = math.prod(shape[1:])
    top = first // row if row else 0
    rows: torch.Tensor = stored[top : math.ceil(last / row) if row else 0]
    return rows.reshape(-1)[first - top * row : last - top * row]
