"""Reads a range of a flattened tensor from a safetensors file. Only the rows that contain the range are read."""

import math
from typing import Any

import torch


def flat_range(stored: Any, *, first: int, last: int) -> torch.Tensor:
    """Return elements [first, last) of a flattened tensor in its dtype. stored: from `safe_open(...).get_slice`."""
    shape = stored.get_shape()
    if not shape:
        return torch.as_tensor(stored[...]).reshape(1)[first:last]
    row = math.prod(shape[1:])
    top = first // row if row else 0
    rows: torch.Tensor = stored[top : math.ceil(last / row) if row else 0]
    return rows.reshape(-1)[first - top * row : last - top * row]
