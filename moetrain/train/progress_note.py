"""The text of the progress line: loss or reward, speed, learning rate, memory, validation and last save."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from moetrain.log import TIME_PREFIX
from moetrain.runtime import resident_bytes

_VALIDATION = "validation/"
_GB = 1e9
_STEPS = 20
"""Steps over which the speed is averaged: a single step may wait for other programs."""


@dataclass(kw_only=True)
class ProgressNote:
    """State of the progress line. headline: name of the metric that comes first."""

    headline: str
    device: torch.device
    validation: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the last validation."""
    saved: int | None = None
    """Step of the last checkpoint whose save has started."""
    _recent: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_STEPS))
    """(tokens, seconds) of the last steps; in RL, of sampled tokens."""

    def of(self, values: Mapping[str, float]) -> str:
        """Return the line for a step with these metrics: `loss 2.383, 3.2k tokens/s, lr 6.0e-03, 1.9 GB, saved 100`."""
        absent = "skipped" if values.get("skipped_steps") else f"no {self.headline}"
        parts = [f"{self.headline} {values[self.headline]:.3f}" if self.headline in values else absent]
        if (speed := self._tokens_per_s(values)) is not None:
            parts.append(f"{_short(speed)} tokens/s")
        if "lr" in values:
            parts.append(f"lr {values['lr']:.1e}")
        parts.append(f"{self._memory() / _GB:.1f} GB")
        held_out = [value for name, value in self.validation.items() if name.startswith(_VALIDATION)]
        if held_out:
            parts.append(f"val {sum(held_out) / len(held_out):.3f}")
        if self.saved is not None:
            parts.append(f"saved {self.saved}")
        return ", ".join(parts)

    def _tokens_per_s(self, values: Mapping[str, float]) -> float | None:
        """Return the mean speed of the last steps, with this one; None if the step has no tokens or took no time."""
        tokens, seconds = values.get("sampled_tokens", values.get("tokens")), values.get(TIME_PREFIX + "seconds")
        if tokens is None or not seconds:
            return None
        self._recent.append((tokens, seconds))
        return sum(tokens for tokens, _ in self._recent) / sum(seconds for _, seconds in self._recent)

    def _memory(self) -> int:
        """Return the memory of this process in bytes: allocated on the GPU if it computes there, else resident."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else resident_bytes()


def _short(number: float) -> str:
    """Return a number with three digits: `843`, `3.21k`, `1.20M`."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
