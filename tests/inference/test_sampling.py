"""Filters of sampling against a slow reference: plain Python, one row, exact fractions of the float32 softmax."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from moetrain.errors import ConfigError
from moetrain.inference.sampling import Allowed, Draw, Sampling, draw, sample, uniforms
from moetrain.ops.logprobs import exponentials
from tests.threads import num_threads

_V = 11
_LOGITS = torch.randn(6, _V, generator=torch.Generator().manual_seed(3)) * 2
_LOGITS[1, 4] = _LOGITS[1, 7] = _LOGITS[1].max() + 0.5  # two most likely tokens
_LOGITS[2] = 1.0  # all equally likely


def _only(*tokens: int, size: int = _V) -> Allowed:
    return np.isin(np.arange(size), tokens)


def _draw(
    logits: torch.Tensor, samplings: list[Sampling], *, allowed: list[Allowed | None] | None = None, unit: float
) -> list[Draw]:
    return draw(
        logits,
        samplings=samplings,
        allowed=allowed or [None] * len(logits),
        uniforms_B=torch.full((len(logits),), unit, dtype=torch.float64),
    )


def _reference(logits: list[float], sampling: Sampling, allowed: set[int]) -> dict[int, float]:
    """Return the probability of each token that remains, by the words of the module's docstring."""
    values = list(logits)
    for token, bias in sampling.logit_bias:
        values[token] += bias
    values = [value if token in allowed else -math.inf for token, value in enumerate(values)]
    if sampling.temperature == 0:
        return {values.index(max(values)): 1.0}
    weights = {token: math.exp((value - max(values)) / sampling.temperature) for token, value in enumerate(values)}
    order = sorted(weights, key=lambda token: (-weights[token], token))
    order = order[: sampling.top_k or len(order)]
    order = [token for token in order if weights[token] >= sampling.min_p]
    kept, mass, total = [], 0.0, sum(weights[token] for token in order)
    for token in order:
        if mass >= sampling.top_p * total and sampling.top_p < 1:
            break
        kept.append(token)
        mass += weights[token]
    return {token: weights[token] / mass for token in kept if weights[token] > 0}


_SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.0),
    Sampling(temperature=0.5, top_p=0.6),
    Sampling(top_k=3),
    Sampling(top_k=5, top_p=0.7, temperature=1.7),
    Sampling(min_p=0.2),
    Sampling(min_p=0.05, top_k=6, top_p=0.9),
    Sampling(logit_bias=((2, 3.0), (5, -math.inf), (2, 0.5))),
    Sampling(logit_bias=((0, -100.0),), top_p=0.5),
    Sampling(top_p=1e-9),
    Sampling(min_p=1.0),
]


@pytest.mark.parametrize("sampling", _SAMPLINGS)
@pytest.mark.parametrize("allowed", [set(range(_V)), {1, 4, 5, 9}])
def test_the_distribution_is_that_of_the_reference(sampling: Sampling, allowed: set[int]) -> None:
    mask = None if len(allowed) == _V else _only(*allowed)
    for row, logits in enumerate(_LOGITS.tolist()):
        expected = _reference(logits, sampling, allowed)
        found: dict[int, float] = {}
        before = 0.0
        for token in sorted(expected):  # a uniform in the middle of a token's share draws this token
            unit = before + expected[token] / 2
            before += expected[token]
            (drawn,) = _draw(_LOGITS[row : row + 1], [sampling], allowed=[mask], unit=unit)
            found[drawn.token] = drawn.logprob if sampling.temperature else 0.0
        assert found.keys() == expected.keys()
        for token, logprob in found.items():
            assert math.isclose(math.exp(logprob), expected[token], rel_tol=1e-5)


def test_a_row_does_not_depend_on_the_other_rows_of_its_batch() -> None:
    samplings = [replace(sampling, top_logprobs=number % 4) for number, sampling in enumerate(_SAMPLINGS)]
    logits = torch.cat([_LOGITS, _LOGITS])[: len(samplings)]
    allowed: list[Allowed | None] = [_only(1, 4, 5, 9) if row % 3 == 0 else None for row in range(len(logits))]
    together = _draw(logits, samplings, allowed=allowed, unit=0.37)
    for row, drawn in enumerate(together):
        alone = _draw(logits[row : row + 1], samplings[row : row + 1], allowed=allowed[row : row + 1], unit=0.37)
        assert alone == [drawn]


def test_default_settings_give_the_bits_of_plain_sampling() -> None:
    logits = _LOGITS.repeat(50, 1)
    draws = torch.from_numpy(
        uniforms(np.arange(len(logits), dtype=np.uint64), np.full(len(logits), 9, dtype=np.uint64))
    )
    for temperature in (1.0, 0.3, 0.0):
        tokens, logprobs = sample(logits, temperatures_B=torch.full((len(logits),), temperature), uniforms_B=draws)
        samplings = [Sampling(temperature=temperature)] * len(logits)
        found = draw(logits, samplings=samplings, allowed=[None] * len(logits), uniforms_B=draws)
        assert [(drawn.token, drawn.logprob) for drawn in found] == list(
            zip(tokens.tolist(), logprobs.tolist(), strict=True)
        )


def test_top_k_of_one_is_the_greedy_token_also_among_equals() -> None:
    for unit in (0.0, 0.5, 1 - 2**-53):
        greedy = _draw(_LOGITS, [Sampling(temperature=0.0)] * 6, unit=unit)
        for sampling in (Sampling(top_k=1), Sampling(top_p=1e-9), Sampling(top_k=1, temperature=3.0)):
            assert [drawn.token for drawn in _draw(_LOGITS, [sampling] * 6, unit=unit)] == [
                drawn.token for drawn in greedy
            ]


def test_a_constraint_is_applied_before_drawing_and_the_free_logprob_is_known() -> None:
    mask = _only(2, 3, size=_V - 4)  # a constraint may know fewer tokens than there are logits
    for unit in (0.0, 0.5, 1 - 2**-53):
        (drawn,) = _draw(_LOGITS[:1], [Sampling(top_p=0.9)], allowed=[mask], unit=unit)
        assert drawn.token in (2, 3)
        assert drawn.free_logprob == pytest.approx(float(torch.log_softmax(_LOGITS[0], -1)[drawn.token]), abs=1e-6)
        assert drawn.logprob > drawn.free_logprob
    assert _draw(_LOGITS[:1], [Sampling()], unit=0.5)[0].free_logprob is None


def test_alternatives_are_the_most_likely_tokens_of_the_distribution_drawn_from() -> None:
    (plain,) = _draw(_LOGITS[:1], [Sampling(top_logprobs=3)], unit=0.5)
    best = torch.log_softmax(_LOGITS[0], -1).topk(3)
    assert [token for token, _ in plain.alternatives] == best.indices.tolist()
    assert [logprob for _, logprob in plain.alternatives] == pytest.approx(best.values.tolist(), abs=1e-6)
    (narrow,) = _draw(_LOGITS[:1], [Sampling(top_logprobs=5, top_k=2)], unit=0.5)
    assert len(narrow.alternatives) == 2 and narrow.logprob in [logprob for _, logprob in narrow.alternatives]
    (equal,) = _draw(_LOGITS[2:3], [Sampling(top_logprobs=4)], unit=0.5)
    assert [token for token, _ in equal.alternatives] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0: give 0"),
        ({"temperature": 1e-9}, "temperature is 1e-09"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0: give a share above 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"logit_bias": ((3, math.nan),)}, "logit_bias of token 3 is nan"),
    ],
)
def test_settings_out_of_range_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**fields)  # type: ignore[arg-type]


def test_rows_whose_filters_keep_more_than_are_sorted_first_are_exact_too() -> None:
    logits = torch.randn(3, 3000, generator=torch.Generator().manual_seed(1)) * 0.2
    logits[2, 100:2900] = logits[2].max()  # 2,800 equally likely tokens
    for sampling in (Sampling(top_p=0.5), Sampling(top_p=0.97), Sampling(min_p=0.3), Sampling(top_k=700, top_p=0.9)):
        together = _draw(logits, [sampling] * 3, unit=0.7)
        for row, drawn in enumerate(together):
            expected = _reference(logits[row].tolist(), sampling, set(range(3000)))
            assert len(expected) > 256
            assert math.exp(drawn.logprob) == pytest.approx(expected[drawn.token], rel=1e-4)
            assert [drawn] == _draw(logits[row : row + 1], [sampling], unit=0.7)


def test_a_row_of_a_large_vocabulary_has_the_same_bits_alone_and_with_several_threads() -> None:
    logits = torch.randn(12, 70_000, generator=torch.Generator().manual_seed(2)) * 3
    with num_threads(2):
        together = exponentials(logits)[1]
        alone = torch.cat([exponentials(row[None])[1] for row in logits])
    with num_threads(1):
        assert torch.equal(together, exponentials(logits)[1])
    assert torch.equal(together, alone)
