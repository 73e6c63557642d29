"""Optimizer and learning-rate schedule. No torch here."""

from dataclasses import dataclass, field
from enum import StrEnum

from moetrain.errors import ConfigError
from moetrain.ranges import BELOW_ONE, NOT_NEGATIVE, POSITIVE, SHARE, check_ranges


class OptimizerName(StrEnum):
    """Which rule updates the hidden matrices; embeddings, head, norms and router are always on AdamW."""

    muon = "muon"
    adamw = "adamw"


class NewtonSchulz(StrEnum):
    """Coefficients of the orthogonalisation: Keller Jordan's five steps, or DeepSeek-V4's eight and two."""

    five = "five"
    hybrid_8_2 = "hybrid_8_2"


class ScheduleName(StrEnum):
    """Shape of the learning rate over steps."""

    wsd = "wsd"
    cosine = "cosine"
    constant = "constant"


class DecayShape(StrEnum):
    """How the decay of wsd goes from the peak to the end (Kimi K2 and DeepSeek-V3: cosine)."""

    linear = "linear"
    cosine = "cosine"


@dataclass(kw_only=True)
class ScheduleConfig:
    """Learning rate as a function of the step."""

    name: ScheduleName = ScheduleName.wsd
    """wsd: warmup, stable, decay. cosine: warmup, then cosine. constant: warmup, then flat."""
    warmup_steps: int = 10
    """Steps of linear warmup."""
    initial_ratio: float = 0.0
    """Learning rate before the first step of the warmup, relative to the peak: a cooldown that warms up again starts
    where the stage before ended."""
    decay_fraction: float = 0.4
    """Share of all steps that the decay of wsd takes."""
    decay_shape: DecayShape = DecayShape.linear
    """Shape of the decay of wsd."""
    final_ratio: float = 0.05
    """Learning rate at the end, relative to the peak."""

    def __post_init__(self) -> None:
        """Check ranges."""
        shares = ("initial_ratio", "decay_fraction", "final_ratio")
        check_ranges(self, prefix="optim.schedule.", ranges={NOT_NEGATIVE: ("warmup_steps",), SHARE: shares})


@dataclass(kw_only=True)
class OptimConfig:
    """MuonClip's family: Muon with RMS matching (arXiv 2502.16982) for hidden matrices, AdamW for the rest."""

    name: OptimizerName = OptimizerName.muon
    """Rule for the hidden matrices."""
    lr: float = 3e-3
    """Peak learning rate; RMS matching lets Muon and AdamW share it."""
    weight_decay: float = 0.05
    """Decoupled weight decay, on every parameter."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's two decay rates."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    momentum: float = 0.95
    """Muon's momentum (Nesterov)."""
    newton_schulz: NewtonSchulz = NewtonSchulz.five
    """Coefficients of the orthogonalisation."""
    clip_norm: float = 1.0
    """Largest global gradient norm; raw gradients are clipped, before orthogonalisation."""
    qk_clip: float | None = None
    """QK-Clip's threshold: largest attention logit a head may have before its queries and keys are made smaller (K2's
    MuonClip: 100). null is off and costs nothing; inf measures the logits and clips none."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate over steps."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(
            self,
            prefix="optim.",
            ranges={
                POSITIVE: ("lr", "eps", "clip_norm"),  # a large clip_norm never clips
                NOT_NEGATIVE: ("weight_decay",),
                BELOW_ONE: ("momentum", "betas"),
            },
        )
        if self.qk_clip is not None and not self.qk_clip > 0:
            raise ConfigError(f"optim.qk_clip is {self.qk_clip}: give a positive logit such as 100, or null (off)")
        if len(self.betas) != 2:
            raise ConfigError(f"optim.betas is {self.betas}: give two numbers from 0 to below 1")
