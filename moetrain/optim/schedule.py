"""The learning rate as a pure function of the step."""

import math

from moetrain.optim.config import ScheduleConfig, ScheduleName


def learning_rate(step: int, total: int, *, lr: float, schedule: ScheduleConfig) -> float:
    """Return the rate of optimizer step `step`, counted from 0, in a run of `total` steps with peak `lr`.

    Warmup is linear: step s takes (s + 1) / warmup_steps of the peak. The last step takes final_ratio of the peak, but
    for `constant`.
    """
    warmup = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    return lr * min(warmup, _decay(step, total, schedule=schedule))


def _decay(step: int, total: int, *, schedule: ScheduleConfig) -> float:
    if schedule.name == ScheduleName.constant:
        return 1.0
    if schedule.name == ScheduleName.wsd:
        length = schedule.decay_fraction * total
        start = total - length
        progress = (step + 1 - start) / length if length else 0.0
        return 1.0 - (1.0 - schedule.final_ratio) * min(1.0, max(0.0, progress))
    length = max(1, total - schedule.warmup_steps)
    progress = min(1.0, max(0.0, (step + 1 - schedule.warmup_steps) / length))
    return schedule.final_ratio + (1.0 - schedule.final_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))
