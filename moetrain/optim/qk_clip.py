"""QK-Clip (Kimi K2, arXiv 2507.20534, section 2.1, algorithm 1), as pure functions of one layer's heads: no model,
ranks or state.

If the largest attention logit S of a head over a step's batch exceeds the threshold tau, the head's queries and keys
are scaled down so that the same inputs give a largest logit of tau. With g = tau / S, the parts of query and key
without position are multiplied by sqrt(g) each. All heads share the rotary key, which is unchanged; the rotary query is
multiplied by g.

H heads, Q query rows of all heads, K key and value rows of all heads.
"""

import torch


def head_factors(max_logits_H: torch.Tensor, *, threshold: float) -> torch.Tensor:
    """Return g per head, float32: threshold / S if S exceeds the threshold, else exactly 1.

    `max_logits_H`: largest softmax input per head, including the softmax scale; -inf for a head without tokens.
    """
    max_logits_H = max_logits_H.float()
    return torch.where(max_logits_H > threshold, threshold / max_logits_H, torch.ones_like(max_logits_H))


def query_factors(g_H: torch.Tensor, *, num_nope: int, num_rope: int) -> torch.Tensor:
    """Return the factor of each row of the query projection [Q], float32.

    Each head has `num_nope` rows without position, then `num_rope` rotary rows.
    """
    return _by_head(g_H.sqrt(), g_H, num_first=num_nope, num_second=num_rope)


def key_value_factors(g_H: torch.Tensor, *, num_nope: int, num_value: int) -> torch.Tensor:
    """Return the factor of each row of the key and value projection [K], float32; it is 1 for values.

    Each head has `num_nope` key rows without position, then `num_value` value rows.
    """
    return _by_head(g_H.sqrt(), torch.ones_like(g_H), num_first=num_nope, num_second=num_value)


def _by_head(first_H: torch.Tensor, second_H: torch.Tensor, *, num_first: int, num_second: int) -> torch.Tensor:
    """Return, for each head in order, `num_first` times its first factor, then `num_second` times its second."""
    parts = [first_H[:, None].expand(-1, num_first), second_H[:, None].expand(-1, num_second)]
    return torch.cat(parts, dim=1).flatten()
