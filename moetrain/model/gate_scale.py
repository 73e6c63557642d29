"""The default factor on the routed output (Moonlight, arXiv 2502.16982, appendix C). No torch.

It is the expectation, over independent Gaussian router logits, of 1 / ||normalised scores of the chosen experts||_2.
With it, the sum of the routed outputs is as large as the output of one expert.
"""

import math
from functools import cache
from statistics import NormalDist

from moetrain.errors import ConfigError
from moetrain.model.config import ModelConfig, ScoreFunction

_NUM_POINTS = 8192  # keeps the error below 1e-4 for the published shapes
_NUM_DECIMALS = 3  # as in the published configs


def routed_scaling_factor(config: ModelConfig) -> float:
    """Return the configured factor, or the derived one if the config leaves it null.

    Raises ConfigError if it must be derived and the weights are not normalised.
    """
    if config.routed_scaling_factor is not None:
        return config.routed_scaling_factor
    if not config.normalize_weights:
        raise ConfigError(
            "model.routed_scaling_factor is null and model.normalize_weights is false: "
            "the factor can be derived only for normalised weights. Give a number"
        )
    return gate_scale(config.num_experts, config.num_experts_per_token, score_function=config.score_function)


@cache
def gate_scale(num_experts: int, num_chosen: int, *, score_function: ScoreFunction = ScoreFunction.sigmoid) -> float:
    """Return the expectation rounded to three decimals.

    Quasi-Monte-Carlo integration makes it the same on every machine.
    """
    quantile = NormalDist().inv_cdf
    steps = _lattice_steps(num_chosen)
    total = 0.0
    for point in range(_NUM_POINTS):
        uniform, scores = 1.0, []
        for chosen, step in enumerate(steps):
            # The largest of n uniforms below a bound is the bound times U^(1/n): only chosen experts need a draw.
            uniform *= ((0.5 + point * step) % 1.0 or 0.5) ** (1.0 / (num_experts - chosen))
            scores.append(_score(quantile(min(uniform, 1.0 - 1e-16)), score_function))
        total += sum(scores) / math.sqrt(sum(score * score for score in scores))
    return round(total / _NUM_POINTS, _NUM_DECIMALS)


def _score(logit: float, score_function: ScoreFunction) -> float:
    if score_function == ScoreFunction.sigmoid:
        return 1.0 / (1.0 + math.exp(-logit))
    if score_function == ScoreFunction.softmax:
        return math.exp(logit)  # the softmax denominator cancels in the normalised scores
    return math.sqrt(math.log1p(math.exp(logit)))


def _lattice_steps(num_dimensions: int) -> list[float]:
    """Return the steps of Roberts' R_d sequence: powers of the root of x^(d+1) = x + 1."""
    root = 2.0
    for _ in range(64):
        root = (1.0 + root) ** (1.0 / (num_dimensions + 1))
    return [root ** -(dimension + 1) % 1.0 for dimension in range(num_dimensions)]
