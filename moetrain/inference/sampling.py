"""Sampling that depends on (stream, position) only, and not on the batch, the slot or the order of arrival.

A row's token is drawn in this order: add `logit_bias`; exclude what the constraint does not allow; divide by the
temperature; keep the `top_k` most likely; exclude those less likely than `min_p` times the most likely; keep the most
likely whose mass reaches `top_p` of what is left. Of equally likely tokens, the one with the smaller id comes first.
Logprobs are those of the distribution that remains.

B sequences, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from moetrain.errors import ConfigError
from moetrain.kernels.build import Library
from moetrain.ops.logprobs import exponentials, read_natively, row_sums
from moetrain.ops.splitmix import GOLDEN, mixed
from moetrain.ranges import TEMPERATURE

_UNIT = 2.0**-53

_LOWEST = torch.finfo(torch.float32).min
_NUM_SORTED = 256
"""Largest logits of a row that are sorted first; all are sorted only for rows whose filters keep more."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. The defaults draw from the model's distribution.

    temperature: 0 takes the most likely token, with its logprob at temperature 1; the filters then have no effect.
    top_k: 0 keeps all. top_p, min_p: see the module. logit_bias: (token id, number to add to its logit); minus infinity
    excludes the token. top_logprobs: number of most likely tokens to report for each sampled token.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        for name, fits, cure in (
            ("temperature", TEMPERATURE.fits(self.temperature), TEMPERATURE.cure),
            ("top_p", 0 < self.top_p <= 1, "give a share above 0, up to 1"),
            ("top_k", self.top_k >= 0, "give a whole number, where 0 keeps all tokens"),
            ("min_p", 0 <= self.min_p <= 1, "give a share from 0 to 1"),
            ("top_logprobs", self.top_logprobs >= 0, "give a whole number from 0"),
        ):
            if not (fits and math.isfinite(getattr(self, name))):
                raise ConfigError(f"{name} is {getattr(self, name)}: {cure}")
        for token, bias in self.logit_bias:
            if math.isnan(bias) or bias == math.inf:
                raise ConfigError(f"logit_bias of token {token} is {bias}: give a finite number")

    @property
    def is_filtered(self) -> bool:
        """Whether some tokens are excluded by their probability."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)

    @property
    def is_shaped(self) -> bool:
        """Whether tokens are drawn from another distribution than the model's at this temperature."""
        return self.is_filtered or bool(self.logit_bias)


Allowed = NDArray[np.bool_]
"""For each token id whether it may follow; ids beyond the end may not. At least one may."""


class Constraint(Protocol):
    """Decides which tokens may follow, from the tokens so far.

    problem: why it could no longer decide, after which it allowed only the end token; "" otherwise.
    """

    problem: str

    def allowed(self) -> Allowed:
        """Return which tokens may follow."""
        ...

    def expected(self) -> list[int]:
        """Return the tokens of the text that must follow; the same text may have other tokens as well."""
        ...

    def allowed_after(self, tokens: Sequence[int]) -> Iterator[Allowed]:
        """Yield which tokens may follow after the first of `tokens`, after the first two, and so on.

        Ends at a token that may not follow. Changes nothing.
        """
        ...

    def advance(self, token: int) -> None:
        """Take note of the token that was drawn."""
        ...


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One drawn token. logprob: of the distribution drawn from.

    free_logprob: logprob at the same temperature without bias, constraint and filters; None without a constraint.
    alternatives: (token, logprob) of the most likely tokens, most likely first.
    """

    token: int
    logprob: float
    free_logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


def uniforms(streams_B: NDArray[np.uint64], positions_B: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return one number from [0, 1) for each (stream, position) by SplitMix64 (`ops.splitmix`)."""
    with np.errstate(over="ignore"):
        mixed_B = mixed(streams_B + GOLDEN * (positions_B + np.uint64(1)))
    units_B: NDArray[np.float64] = (mixed_B >> np.uint64(11)).astype(np.float64) * _UNIT
    return units_B


def draw(
    logits_BV: torch.Tensor,
    *,
    samplings: Sequence[Sampling],
    allowed: Sequence[Allowed | None],
    uniforms_B: torch.Tensor,
    library: Library | None = None,
) -> list[Draw]:
    """Return one token per row. Rows with default settings cost no more than `sample`.

    allowed: the tokens that a row's constraint allows; None without a constraint. library: kernels by which the
    logprobs of rows without bias, constraint and filters are computed as training does; None computes them by torch.
    """
    temperatures = [sampling.temperature for sampling in samplings]
    temperatures_B = torch.tensor(temperatures, dtype=torch.float32, device=logits_BV.device)
    shaped_BV = _shape(logits_BV, samplings=samplings, allowed=allowed)
    tokens_B, logprobs_B = sample(shaped_BV, temperatures_B=temperatures_B, uniforms_B=uniforms_B)
    rows = [row for row, each in enumerate(samplings) if not each.is_shaped and allowed[row] is None]
    if library is not None and rows:
        divisors_R = torch.where(temperatures_B == 0, 1.0, temperatures_B)[rows]
        read = read_natively(logits_BV[rows].bfloat16(), tokens_B[rows], temperatures_C=divisors_R, library=library)
        logprobs_B[rows] = read.logprobs_C
    tokens, logprobs = tokens_B.tolist(), logprobs_B.tolist()
    free: dict[int, float] = {}
    rows = [row for row, mask_V in enumerate(allowed) if mask_V is not None]
    if rows:
        free_RV = _logprobs(logits_BV[rows], [samplings[row] for row in rows])
        free = dict(zip(rows, free_RV.gather(1, tokens_B[rows, None])[:, 0].tolist(), strict=True))
    best: dict[int, tuple[tuple[int, float], ...]] = {}
    rows = [row for row, sampling in enumerate(samplings) if sampling.top_logprobs]
    if rows:
        shaped_RV = _logprobs(shaped_BV[rows], [samplings[row] for row in rows])
        best = dict(zip(rows, _most_likely(shaped_RV, [samplings[row].top_logprobs for row in rows]), strict=True))
    return [
        Draw(token=token, logprob=logprob, free_logprob=free.get(row), alternatives=best.get(row, ()))
        for row, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True))
    ]


def sample(
    logits_BV: torch.Tensor, *, temperatures_B: torch.Tensor, uniforms_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and their logprobs, both [B]. A token whose logit is minus infinity is never drawn.

    Temperature 0 returns the most likely token (the first of equals) and its logprob at temperature 1. Otherwise the
    token is drawn by inverting the cumulative distribution at the given uniform, and the logprob is that of the
    distribution sampled from.
    """
    is_greedy_B = temperatures_B == 0
    scaled_BV = logits_BV.float() / torch.where(is_greedy_B, 1.0, temperatures_B)[:, None]
    terms_BV, _, normalizers_B = exponentials(scaled_BV)
    cumulative_BV = terms_BV.double().cumsum(dim=-1)
    thresholds_B1 = (uniforms_B.double() * cumulative_BV[:, -1])[:, None]
    drawn_B = torch.searchsorted(cumulative_BV, thresholds_B1, right=True)[:, 0].clamp_max(logits_BV.shape[-1] - 1)
    tokens_B = torch.where(is_greedy_B, logits_BV.argmax(dim=-1), drawn_B)
    return tokens_B, scaled_BV.gather(1, tokens_B[:, None])[:, 0] - normalizers_B


def _shape(
    logits_BV: torch.Tensor, *, samplings: Sequence[Sampling], allowed: Sequence[Allowed | None]
) -> torch.Tensor:
    """Return logits with biases added and excluded tokens at minus infinity; the same tensor if nothing changes."""
    biased = [row for row, sampling in enumerate(samplings) if sampling.logit_bias]
    constrained = [(row, mask_V) for row, mask_V in enumerate(allowed) if mask_V is not None]
    filtered = [row for row, sampling in enumerate(samplings) if sampling.is_filtered]
    if not (biased or constrained or filtered):
        return logits_BV
    shaped_BV = logits_BV.float().clone()
    for row in biased:
        tokens, biases = zip(*samplings[row].logit_bias, strict=True)
        index = torch.tensor(tokens, device=shaped_BV.device)
        shaped_BV[row].index_add_(0, index, torch.tensor(biases, device=shaped_BV.device))
    for row, mask_V in constrained:
        is_allowed_V = torch.from_numpy(mask_V[: shaped_BV.shape[1]]).to(shaped_BV.device)
        shaped_BV[row, : len(is_allowed_V)].masked_fill_(~is_allowed_V, -math.inf)
        shaped_BV[row, len(is_allowed_V) :] = -math.inf
    if filtered:
        shaped_BV[filtered] = _filter(shaped_BV[filtered], [samplings[row] for row in filtered])
    return shaped_BV


def _filter(logits_BV: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """Return the logits with the tokens that top_k, min_p and top_p exclude at minus infinity."""
    vocab_size = logits_BV.shape[1]
    largest = max(min(max(sampling.top_k for sampling in samplings), vocab_size), _NUM_SORTED)
    is_excluded_BV, is_complete_B = _excluded(logits_BV, samplings, num_sorted=min(largest, vocab_size))
    rest = (~is_complete_B).nonzero()[:, 0].tolist()
    if rest:
        of_rest = [samplings[row] for row in rest]
        is_excluded_BV[rest] = _excluded(logits_BV[rest], of_rest, num_sorted=vocab_size)[0]
    return logits_BV.masked_fill(is_excluded_BV, -math.inf)


def _excluded(
    logits_BV: torch.Tensor, samplings: Sequence[Sampling], *, num_sorted: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which tokens are excluded [B, V], and for which rows the `num_sorted` largest logits decide it [B].

    `num_sorted` is at least every top_k. Where they do, the result does not depend on it.
    """

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits_BV.device)[:, None]

    scaled_BV = logits_BV / column([sampling.temperature for sampling in samplings]).float()
    sorted_BK = scaled_BV.topk(num_sorted).values
    top_k_B1 = column([sampling.top_k or math.inf for sampling in samplings])
    min_p_B1 = column([sampling.min_p for sampling in samplings])
    top_p_B1 = column([sampling.top_p for sampling in samplings])
    shares_BK = (sorted_BK - sorted_BK[:, :1]).exp().double()  # relative to the most likely token
    ranks_K = torch.arange(num_sorted, device=logits_BV.device)
    is_kept_BK = (ranks_K < top_k_B1) & (shares_BK >= min_p_B1)
    kept_BK = shares_BK * is_kept_BK
    shares_BV = (scaled_BV - sorted_BK[:, :1]).exp().double()
    whole_B1 = row_sums(shares_BV * (shares_BV >= min_p_B1))[:, None]
    whole_B1 = torch.where(top_k_B1 <= num_sorted, kept_BK.sum(dim=-1, keepdim=True), whole_B1)
    # top_p = 1 keeps all, also where rounding makes the mass before a token reach the whole.
    is_kept_BK &= (top_p_B1 == 1) | (kept_BK.cumsum(dim=-1) - kept_BK < top_p_B1 * whole_B1)
    num_kept_B1 = is_kept_BK.sum(dim=-1, keepdim=True)
    is_complete_B = (num_kept_B1[:, 0] < num_sorted) | (top_k_B1[:, 0] <= num_sorted)
    smallest_B1 = sorted_BK.gather(1, num_kept_B1 - 1)
    is_equal_BV = scaled_BV == smallest_B1
    num_equal_B1 = num_kept_B1 - (scaled_BV > smallest_B1).sum(dim=-1, keepdim=True)
    return (scaled_BV < smallest_B1) | (is_equal_BV & (is_equal_BV.cumsum(dim=-1) > num_equal_B1)), is_complete_B


def _logprobs(logits_BV: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """Return the logprobs of all tokens, computed as in `sample`."""
    divisors = [sampling.temperature or 1.0 for sampling in samplings]
    scaled_BV = logits_BV.float() / torch.tensor(divisors, dtype=torch.float32, device=logits_BV.device)[:, None]
    return scaled_BV - exponentials(scaled_BV)[2][:, None]


def _most_likely(logprobs_BV: torch.Tensor, numbers: Sequence[int]) -> list[tuple[tuple[int, float], ...]]:
    """Return per row the given number of (token, logprob), most likely first; tokens of probability 0 are left out."""
    found = []
    for logprobs_V, number in zip(logprobs_BV, numbers, strict=True):
        smallest = logprobs_V.topk(min(number, len(logprobs_V))).values[-1].clamp_min(_LOWEST)
        tokens = (logprobs_V >= smallest).nonzero()[:, 0]
        order = logprobs_V[tokens].sort(descending=True, stable=True)
        found.append(tuple(zip(tokens[order.indices[:number]].tolist(), order.values[:number].tolist(), strict=True)))
    return found
