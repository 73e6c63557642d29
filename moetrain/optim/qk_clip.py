"""QK-Clip (Kimi K2, arXiv 2507.20534, section 2.1, algorithm 1), as pure functions of one layer's heads: no model, no
ranks, no state.

A head whose largest attention logit S over a step's batch is above the threshold tau has its queries and keys made
smaller, so that with the same inputs its largest logit is tau. With g = tau / S, the parts of query and key without
position take sqrt(g) each. The rotary key is shared by all heads and stays; the rotary query takes the whole g.

H heads, Q query rows of all heads, K key and value rows of all heads.
"""

import torch


def head_factors(max_logits_H: torch.Tensor, *, threshold: float) -> torch.Tensor:
    """Return g for each head, float32: threshold / S where S is above the threshold, exactly 1 elsewhere.

    `max_logits_H`: largest softmax input of each head, the softmax scale included; -inf for a head that saw no token.
    """
    max_logits_H = max_logits_H.float()
    return torch.where(max_logits_H > threshold, threshold / max_logits_H, torch.ones_like(max_logits_H))


def query_factors(g_H: torch.Tensor, *, num_nope: int, num_rope: int) -> torch.Tensor:
    """Return what each row of the query projection is multiplied by [Q], float32.

    A head has `num_nope` rows without position, then `num_rope` rotary ones.
    """
    return _by_head(g_H.sqrt(), g_H, num_first=num_nope, num_second=num_rope)


def key_value_factors(g_H: torch.Tensor, *, num_nope: int, num_value: int) -> torch.Tensor:
    """Return what each row of the key and value projection is multiplied by [K], float32; values take 1.

    A head has `num_nope` key rows without position, then `num_value` value rows.
    """
    return _by_head(g_H.sqrt(), torch.ones_like(g_H), num_first=num_nope, num_second=num_value)


def _by_head(first_H: torch.Tensor, second_H: torch.Tensor, *, num_first: int, num_second: int) -> torch.Tensor:
    """Return, head after head, `num_first` times its first factor, then `num_second` times its second."""
    parts = [first_H[:, None].expand(-1, num_first), second_H[:, None].expand(-1, num_second)]
    return torch.cat(parts, dim=1).flatten()
