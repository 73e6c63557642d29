"""QK-Clip in a training step: the largest logits of the whole batch, and the row factors that follow from them.

`optim.qk_clip` contains the arithmetic, `ops.max_logits` measures the logits, and the engine multiplies the masters. A
attention layers, H heads.
"""

from collections.abc import Sequence

import torch

from moetrain.errors import ConfigError
from moetrain.model.transformer import Transformer
from moetrain.optim.qk_clip import head_factors, key_value_factors, query_factors
from moetrain.parallel.protocol import Engine, ObjectiveResult
from moetrain.parallel.topology import Topology


def batch_max_logits(results: Sequence[ObjectiveResult], topology: Topology) -> torch.Tensor:
    """Return the largest logit of each head over all micro-batches and ranks [A, H], float32. Collective.

    A maximum does not depend on how the batch is split, so a micro-batch that runs twice changes nothing. Raises
    ConfigError if the objective does not measure the logits.
    """
    measured = [result.max_logits_AH for result in results if result.max_logits_AH is not None]
    if len(measured) < len(results):
        raise ConfigError(
            "optim.qk_clip is set, but the objective returns no max_logits_AH: call the model with "
            "max_logits=MaxLogits.measured and return its max_logits_AH"
        )
    return topology.all_reduce_max(torch.stack(measured).amax(0))


def row_factors(model: Transformer, max_logits_AH: torch.Tensor, *, threshold: float) -> dict[str, torch.Tensor]:
    """Return the factors for `Engine.multiply_rows`, only for layers in which a head exceeds the threshold."""
    config = model.config
    factors = {}
    for (name, _), max_logits_H in zip(model.attention_layers(), max_logits_AH, strict=True):
        g_H = head_factors(max_logits_H, threshold=threshold)
        if bool((g_H == 1).all()):
            continue
        queries = "q_proj" if config.q_lora_rank is None else "q_b_proj"
        factors[f"{name}.{queries}.weight"] = query_factors(
            g_H, num_nope=config.qk_nope_head_dim, num_rope=config.qk_rope_head_dim
        )
        factors[f"{name}.kv_b_proj.weight"] = key_value_factors(
            g_H, num_nope=config.qk_nope_head_dim, num_value=config.v_head_dim
        )
    return factors


def clip_attention(engine: Engine, max_logits_AH: torch.Tensor, *, threshold: float) -> None:
    """Scale down the queries and keys of heads above the threshold, in the master weights. Collective, after a step.

    The logits were measured with the weights before the step, as in the paper. One step changes a head only slightly,
    and the next batch is measured again.
    """
    factors = row_factors(engine.model, max_logits_AH, threshold=threshold)
    if factors:
        engine.multiply_rows(factors)


def logit_metrics(model: Transformer, max_logits_AH: torch.Tensor, *, threshold: float) -> dict[str, float]:
    """Return the largest logit per layer and overall, and the number of heads above the threshold."""
    names = [name for name, _ in model.attention_layers()]
    by_layer = max_logits_AH.amax(1).tolist()
    return {
        **{f"max_logit/{name}": largest for name, largest in zip(names, by_layer, strict=True)},
        "max_logit": max(by_layer),
        "heads_clipped": float((max_logits_AH > threshold).sum()),
    }
