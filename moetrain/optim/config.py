"""Config of the optimizer and the learning-rate schedule. Imports no torch."""

from dataclasses import dataclass, field
from enum import StrEnum

from moetrain.errors import ConfigError
from moetrain.ranges import BELOW_ONE, NOT_NEGATIVE, POSITIVE, SHARE, check_ranges, check_unused


class OptimizerName(StrEnum):
    """Optimizer of the hidden matrices; embeddings, head, norms and router always use AdamW."""

    muon = "muon"
    adamw = "adamw"


class NewtonSchulz(StrEnum):
    """Coefficients of the orthogonalisation: Keller Jordan's five steps, or DeepSeek-V4's eight and two."""

    five = "five"
    hybrid_8_2 = "hybrid_8_2"


class ScheduleName(StrEnum):
    """Shape of the learning-rate schedule."""

    wsd = "wsd"
    cosine = "cosine"
    constant = "constant"


class DecayShape(StrEnum):
    """Shape of the decay of wsd from the peak to the final rate (Kimi K2 and DeepSeek-V3: cosine)."""

    linear = "linear"
    cosine = "cosine"


@dataclass(kw_only=True)
class ScheduleConfig:
    """Learning rate as a function of the step."""

    name: ScheduleName = ScheduleName.wsd
    """wsd: warmup, stable, decay. cosine: warmup, then cosine decay. constant: warmup, then constant."""
    warmup_steps: int = 10
    """Number of steps of linear warmup."""
    initial_ratio: float = 0.0
    """Learning rate at the start of the warmup, relative to the peak. Set it when a stage starts at the rate at which
    the previous stage ended."""
    decay_fraction: float = 0.4
    """Share of all steps in the decay phase of wsd."""
    decay_shape: DecayShape = DecayShape.linear
    """Shape of the decay phase of wsd."""
    final_ratio: float = 0.05
    """Final learning rate, relative to the peak."""

    def __post_init__(self) -> None:
        """Check ranges."""
        shares = ("initial_ratio", "decay_fraction", "final_ratio")
        check_ranges(self, prefix="optim.schedule.", ranges={NOT_NEGATIVE: ("warmup_steps",), SHARE: shares})
        unused = {
            ScheduleName.wsd: (),
            ScheduleName.cosine: ("decay_fraction", "decay_shape"),
            ScheduleName.constant: ("decay_fraction", "decay_shape", "final_ratio"),
        }[self.name]
        reason = f"optim.schedule.name is {self.name}"
        check_unused(self, prefix="optim.schedule.", fields=unused, reason=reason)


@dataclass(kw_only=True)
class OptimConfig:
    """Muon with RMS matching (arXiv 2502.16982) for hidden matrices, AdamW for the rest; MuonClip with qk_clip."""

    name: OptimizerName = OptimizerName.muon
    """Optimizer of the hidden matrices."""
    lr: float = 3e-3
    """Peak learning rate; because of RMS matching, Muon and AdamW share it."""
    weight_decay: float = 0.05
    """Decoupled weight decay of all parameters."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's two decay rates (beta1, beta2)."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    momentum: float = 0.95
    """Muon's momentum (Nesterov)."""
    newton_schulz: NewtonSchulz = NewtonSchulz.five
    """Coefficients of Muon's orthogonalisation."""
    clip_norm: float = 1.0
    """Maximum global gradient norm; gradients are clipped before orthogonalisation."""
    qk_clip: float | None = None
    """Threshold of QK-Clip: heads whose largest attention logit exceeds it get their queries and keys scaled down (K2's
    MuonClip: 100). null disables it at no cost; inf measures the logits but never clips."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning-rate schedule."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(
            self,
            prefix="optim.",
            ranges={
                POSITIVE: ("lr", "eps", "clip_norm"),  # to disable clipping, use a large clip_norm
                NOT_NEGATIVE: ("weight_decay",),
                BELOW_ONE: ("momentum", "betas"),
            },
        )
        if self.name is OptimizerName.adamw:
            unused = ("momentum", "newton_schulz")
            check_unused(self, prefix="optim.", fields=unused, reason=f"optim.name is {self.name}")
        if self.qk_clip is not None and not self.qk_clip > 0:
            raise ConfigError(f"optim.qk_clip is {self.qk_clip}: give a positive logit such as 100, or null (off)")
        if len(self.betas) != 2:
            raise ConfigError(f"optim.betas is {self.betas}: give two numbers from 0 to below 1")
