"""Parameter counts and FLOPs of a model shape, by arithmetic alone. Imports no torch, so planning runs anywhere."""

from dataclasses import dataclass

from moetrain.model.config import ModelConfig

_MATRICES_OF_SWIGLU = 3
_FORWARD_AND_BACKWARD = 3  # the backward pass computes two products per forward product
_FLOPS_PER_MULTIPLY_ADD = 2


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Parameter counts of a model; the balance biases are buffers and are not counted."""

    total: int
    """All parameters, including the input embedding and the head."""
    routed: int
    """Parameters of all routed experts."""
    active: int
    """Parameters used per token, without input embedding and head."""
    active_with_head: int
    """Parameters used per token, including the head but not the input embedding."""
    mtp: int = 0
    """Parameters of the modules of multi-token prediction; part of `total` and, their experts, of `routed`."""
    active_mtp: int = 0
    """Parameters of them used per token in training, without the head, which each of them uses once more."""


def attention_parameters(config: ModelConfig) -> int:
    """Return the parameters of one attention layer, including its latent norms."""
    hidden, heads = config.hidden_size, config.num_heads
    if config.q_lora_rank is None:
        queries = hidden * heads * config.qk_head_dim
    else:
        queries = config.q_lora_rank * (hidden + 1 + heads * config.qk_head_dim)
    latent = hidden * (config.kv_lora_rank + config.qk_rope_head_dim) + config.kv_lora_rank
    keys_and_values = config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    return queries + latent + keys_and_values + heads * config.v_head_dim * hidden


def feed_forward_parameters(config: ModelConfig, width: int) -> int:
    """Return the parameters of a feed-forward layer of width `width`."""
    return _MATRICES_OF_SWIGLU * config.hidden_size * width


def expert_parameters(config: ModelConfig) -> int:
    """Return the parameters of one routed expert."""
    return feed_forward_parameters(config, config.moe_intermediate_size)


def num_parameters(config: ModelConfig) -> ParameterCounts:
    """Return the exact parameter counts of a model shape."""
    hidden = config.hidden_size
    norms = (2 * config.num_layers + 1) * hidden
    attention = config.num_layers * attention_parameters(config)
    dense = config.num_dense_layers * feed_forward_parameters(config, config.intermediate_size)
    expert, router = expert_parameters(config), config.num_experts * hidden
    always = norms + attention + dense + config.num_moe_layers * (router + config.num_shared_experts * expert)
    routed = config.num_moe_layers * config.num_experts * expert
    active = always + config.num_moe_layers * config.num_experts_per_token * expert
    head = config.vocab_size * hidden
    # Each module joins two vectors, and has three norms beside those of its block.
    shared = router + config.num_shared_experts * expert
    module = 2 * hidden * hidden + 5 * hidden + attention_parameters(config) + shared
    routed_mtp = config.num_mtp_layers * config.num_experts * expert
    mtp = config.num_mtp_layers * module + routed_mtp
    return ParameterCounts(
        total=always + routed + 2 * head + mtp,
        routed=routed + routed_mtp,
        active=active,
        active_with_head=active + head,
        mtp=mtp,
        active_mtp=config.num_mtp_layers * (module + config.num_experts_per_token * expert),
    )


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Return the FLOPs of one token's forward and backward pass, in documents of `seq_len` tokens.

    6 FLOPs per active parameter (head included, input embedding excluded), plus causal attention over half the document
    on average. Modules of multi-token prediction are included. Norms, softmax and rotations are excluded, as is usual
    for MFU.
    """
    counts = num_parameters(config)
    head = config.vocab_size * config.hidden_size
    products = _FLOPS_PER_MULTIPLY_ADD * (counts.active_with_head + counts.active_mtp + config.num_mtp_layers * head)
    attention = (
        (config.num_layers + config.num_mtp_layers)
        * config.num_heads
        * (config.qk_head_dim + config.v_head_dim)
        * _FLOPS_PER_MULTIPLY_ADD
        * (seq_len / 2)
    )
    return _FORWARD_AND_BACKWARD * (products + attention)
