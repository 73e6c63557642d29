"""The learning rate as a pure function of the step."""

import math

from moetrain.optim.config import DecayShape, ScheduleConfig, ScheduleName


def learning_rate(step: int, total: int, *, lr: float, schedule: ScheduleConfig) -> float:
    """Return the learning rate of optimizer step `step` (from 0) in a run of `total` steps with peak `lr`.

    Warmup is linear from initial_ratio to 1: step s covers (s + 1) / warmup_steps of the way. The last step uses
    final_ratio of the peak, except with `constant`. Where warmup and decay overlap, the smaller rate applies.
    """
    warmup = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    warmup = schedule.initial_ratio + (1.0 - schedule.initial_ratio) * warmup
    return lr * min(warmup, _decay(step, total, schedule=schedule))


def _decay(step: int, total: int, *, schedule: ScheduleConfig) -> float:
    if schedule.name == ScheduleName.constant:
        return 1.0
    if schedule.name == ScheduleName.wsd:
        length = schedule.decay_fraction * total
        start = total - length
        progress = min(1.0, max(0.0, (step + 1 - start) / length)) if length else 0.0
        if schedule.decay_shape == DecayShape.cosine:
            return _cosine(progress, final_ratio=schedule.final_ratio)
        return 1.0 - (1.0 - schedule.final_ratio) * progress
    length = max(1, total - schedule.warmup_steps)
    progress = min(1.0, max(0.0, (step + 1 - schedule.warmup_steps) / length))
    return _cosine(progress, final_ratio=schedule.final_ratio)


def _cosine(progress: float, *, final_ratio: float) -> float:
    return final_ratio + (1.0 - final_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))
