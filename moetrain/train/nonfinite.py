"""Steps whose loss or gradient norm is not a finite number: left out and counted where the policy says so.

`train.step` decides, from numbers that are the same on every rank, so that all ranks leave the same steps out. The
counts are part of a checkpoint: a run that was stopped ends at the same limit as one that was not.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

from moetrain.errors import DivergenceError
from moetrain.train.config import NonfinitePolicy, TrainConfig

_log = logging.getLogger(__name__)

SKIPPED = "skipped"
"""Key that `train.step.train_step` sets in the values of a step that it left out."""


@dataclass(kw_only=True)
class Skips:
    """Steps left out so far: `total`, and `in_row`, those since the last step that was taken."""

    total: int = 0
    in_row: int = 0

    def note(self, values: Mapping[str, float], config: TrainConfig, *, step: int) -> dict[str, float]:
        """Count step `step` if it was left out, and return its metrics: finite ones, and `skipped_steps`.

        Under `NonfinitePolicy.stop` nothing is counted and `values` come back as they are. Raises `DivergenceError`
        when more than `config.max_skipped_in_row` steps in a row were left out.
        """
        if config.on_nonfinite is NonfinitePolicy.stop:
            return dict(values)
        was_skipped = SKIPPED in values
        self.total += was_skipped
        self.in_row = self.in_row + 1 if was_skipped else 0
        if was_skipped:
            _log.warning(
                "step %d is left out: the loss is %s, the gradient norm %s; weights and optimizer stay (%d so far)",
                step,
                values["loss"],
                values["grad_norm"],
                self.total,
            )
        if self.in_row > config.max_skipped_in_row:
            raise DivergenceError(
                f"step {step}: {self.in_row} steps in a row had a loss or gradient that is not finite, where "
                f"train.max_skipped_in_row is {config.max_skipped_in_row}: the weights or the data are at fault, not "
                "one batch. Start again from an earlier checkpoint, or with a lower optim.lr"
            )
        # JSON has no number for what is not finite.
        kept = {name: value for name, value in values.items() if name != SKIPPED and math.isfinite(value)}
        return {**kept, "skipped_steps": float(self.total)}
