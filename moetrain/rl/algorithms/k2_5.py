"""The token-level policy objective of Kimi K2.5 (arXiv 2602.02276, eq. 1)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moetrain.errors import ConfigError
from moetrain.ranges import NOT_NEGATIVE, check_ranges
from moetrain.rl.advantage import centred
from moetrain.rl.protocol import Normalizer, TokenLoss
from moetrain.rollout.types import Trajectory


@dataclass(kw_only=True)
class K25:
    """Loss of a token: -(clip(ratio) * advantage - tau * log(ratio)^2), over all sampled tokens of the step.

    ratio is the token's probability under the present policy, divided by the probability with which it was sampled.
    Outside [ratio_low, ratio_high] the clipped ratio is constant, so that the token has no policy gradient, for either
    sign of its advantage.
    """

    ratio_low: float = 0.5
    """Probability ratio below which a token has no policy gradient."""
    ratio_high: float = 2.0
    """Probability ratio above which a token has no policy gradient."""
    tau: float = 1e-3
    """Weight of the squared log-ratio of each token."""

    columns = ("advantage", "logprob")
    normalizer = Normalizer.sampled_tokens

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(self, prefix="rl.options.", ranges={NOT_NEGATIVE: ("tau", "ratio_low", "ratio_high")})
        if not 0 < self.ratio_low < 1 < self.ratio_high:
            raise ConfigError(
                f"rl.options.ratio_low and ratio_high are {self.ratio_low} and {self.ratio_high}: "
                "give one number between 0 and 1 and one above 1"
            )

    def advantages(self, group_G: Sequence[Trajectory]) -> list[list[list[float]]]:
        """Return the reward minus the group's mean, not divided by its deviation (arXiv 2503.20783)."""
        return centred(group_G)

    def token_loss(self, logprobs_N: torch.Tensor, *, columns: Mapping[str, torch.Tensor]) -> TokenLoss:
        """Return the loss of each token, and the number of tokens whose ratio is outside the window."""
        log_ratio_N = logprobs_N - columns["logprob"]
        ratio_N = log_ratio_N.exp()
        clipped_N = ratio_N.clamp(self.ratio_low, self.ratio_high)
        loss_N = -(clipped_N * columns["advantage"] - self.tau * log_ratio_N.square())
        outside_N = (ratio_N < self.ratio_low) | (ratio_N > self.ratio_high)
        return TokenLoss(loss_N=loss_N, sums={"outside_window": outside_N.sum()})
