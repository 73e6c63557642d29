"""Steps whose loss or gradient norm is not finite: skipped and counted, if the policy is `skip`.

`train.step` decides from numbers that are equal on every rank, so all ranks skip the same steps. The counts are part of
a checkpoint, so a resumed run reaches the limit at the same step.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

from moetrain.errors import DivergenceError
from moetrain.train.config import NonfinitePolicy, TrainConfig

_log = logging.getLogger(__name__)

SKIPPED = "skipped"
"""Key in the metrics of `train.step.train_step` that marks a skipped step."""


@dataclass(kw_only=True)
class Skips:
    """Counts of skipped steps. total: of the run. in_row: since the last step that was not skipped."""

    total: int = 0
    in_row: int = 0

    def note(self, values: Mapping[str, float], config: TrainConfig, *, step: int) -> dict[str, float]:
        """Count step `step` (from 0) if it was skipped, and return its finite metrics and `skipped_steps`.

        Under `NonfinitePolicy.stop` nothing is counted and `values` is returned unchanged. Raises `DivergenceError`
        after more than `config.max_skipped_in_row` consecutive skipped steps.
        """
        if config.on_nonfinite is NonfinitePolicy.stop:
            return dict(values)
        was_skipped = SKIPPED in values
        self.total += was_skipped
        self.in_row = self.in_row + 1 if was_skipped else 0
        if was_skipped:
            _log.warning(
                "step %d is skipped (%d so far): the loss is %s, gradient norm %s; weights and optimizer are unchanged",
                step + 1,
                self.total,
                values["loss"],
                values["grad_norm"],
            )
        if self.in_row > config.max_skipped_in_row:
            raise DivergenceError(
                f"step {step + 1}: {self.in_row} steps in a row had a loss or gradient that is not finite, and "
                f"train.max_skipped_in_row is {config.max_skipped_in_row}. The cause is the weights or the data, not a "
                "single batch. Start again from an earlier checkpoint, or with a lower optim.lr"
            )
        # JSON cannot express NaN or infinity.
        finite = {name: value for name, value in values.items() if name != SKIPPED and math.isfinite(value)}
        return {**finite, "skipped_steps": float(self.total)}
