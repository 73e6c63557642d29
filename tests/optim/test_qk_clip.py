"""QK-Clip's factors against algorithm 1 of the K2 report, written out head by head."""

import math

import torch

from moetrain.optim.qk_clip import head_factors, key_value_factors, query_factors

NOPE, ROPE, VALUE = 3, 2, 4
MAX_LOGITS_H = torch.tensor([50.0, 250.0, 100.0, float("-inf"), 101.0])


def test_rows_of_a_head_above_the_threshold_take_the_factors_of_the_paper() -> None:
    tau = 100.0
    g_H = head_factors(MAX_LOGITS_H, threshold=tau)
    queries, keys = [], []
    for largest in MAX_LOGITS_H.tolist():
        g = tau / largest if largest > tau else 1.0
        queries += [math.sqrt(g)] * NOPE + [g] * ROPE
        keys += [math.sqrt(g)] * NOPE + [1.0] * VALUE
    found = query_factors(g_H, num_nope=NOPE, num_rope=ROPE)
    torch.testing.assert_close(found, torch.tensor(queries), rtol=2e-7, atol=0)
    found = key_value_factors(g_H, num_nope=NOPE, num_value=VALUE)
    torch.testing.assert_close(found, torch.tensor(keys), rtol=2e-7, atol=0)


def test_heads_at_or_below_the_threshold_take_exactly_one() -> None:
    assert head_factors(MAX_LOGITS_H, threshold=100.0)[[0, 2, 3]].tolist() == [1.0, 1.0, 1.0]
    assert head_factors(MAX_LOGITS_H, threshold=math.inf).tolist() == [1.0] * 5


def test_the_logits_of_a_clipped_head_are_multiplied_by_one_factor() -> None:
    """With both parts of a query and its keys, and a rotary key that stays: q k' + r k_r is scaled as a whole."""
    stream = torch.Generator().manual_seed(0)
    rows = torch.randn(NOPE + ROPE, 6, generator=stream)
    keys = torch.randn(NOPE + VALUE, 6, generator=stream)
    x, latent, k_rope = (torch.randn(width, generator=stream) for width in (6, 6, ROPE))

    def logit(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        q = queries @ x
        return q[:NOPE] @ (keys @ latent)[:NOPE] + q[NOPE:] @ k_rope

    g_H = head_factors(torch.tensor([400.0]), threshold=100.0)
    clipped = logit(
        query_factors(g_H, num_nope=NOPE, num_rope=ROPE)[:, None] * rows,
        key_value_factors(g_H, num_nope=NOPE, num_value=VALUE)[:, None] * keys,
    )
    torch.testing.assert_close(clipped, 0.25 * logit(rows, keys))
