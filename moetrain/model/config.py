"""The shape of the model: all hyperparameters of the DeepSeek-V3 / Kimi K2 architecture. Imports no torch."""

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum

from moetrain.errors import ConfigError
from moetrain.ranges import COUNT, NOT_NEGATIVE, POSITIVE, check_ranges


class ScoreFunction(StrEnum):
    """How router logits become scores."""

    sigmoid = "sigmoid"
    softmax = "softmax"
    sqrt_softplus = "sqrt_softplus"


class BiasRule(StrEnum):
    """How the aux-loss-free balance bias is updated after a step: `sign` (arXiv 2408.15664), `centred` (Moonlight,
    appendix C) or `quantile` (Kimi K3, appendix D; has no rate).
    """

    none = "none"
    sign = "sign"
    centred = "centred"
    quantile = "quantile"


class Recompute(StrEnum):
    """Activation checkpointing: keep all activations (`none`), or recompute attention, feed-forward and experts in the
    backward pass (`blocks`).
    """

    none = "none"
    blocks = "blocks"


@dataclass(kw_only=True)
class YarnConfig:
    """Context extension by YaRN (arXiv 2309.00071); factor 1 disables it."""

    factor: float = 1.0
    """Ratio of the extended context length to the trained one."""
    original_max_position: int = 4096
    """Number of positions that the model was trained on before the extension."""
    beta_fast: float = 1.0
    """A frequency with more rotations than this over the original context is unchanged (K2: 1, DeepSeek-V3: 32)."""
    beta_slow: float = 1.0
    """A frequency with fewer rotations than this over the original context is divided by factor."""
    mscale: float = 1.0
    """Scale of cos and sin, relative to mscale_all_dim."""
    mscale_all_dim: float = 1.0
    """Scale of the attention logits: softmax scale is multiplied by (0.1 * mscale_all_dim * ln(factor) + 1)^2."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(
            self,
            prefix="model.yarn.",
            ranges={
                COUNT: ("factor", "original_max_position"),
                POSITIVE: ("beta_fast", "beta_slow"),
                NOT_NEGATIVE: ("mscale", "mscale_all_dim"),
            },
        )


@dataclass(kw_only=True)
class BalanceConfig:
    """Load balancing of tokens over experts."""

    bias_rule: BiasRule = BiasRule.centred
    """Rule that updates the router's balance bias after each step."""
    bias_rate: float = 1e-3
    """Size of the bias update per step (rules sign and centred)."""
    bias_still_share: float = 0.0
    """Share of the steps, at the end of training, in which the bias is frozen (DeepSeek-V3, arXiv 2412.19437, section
    4.2: 500B of 14.8T tokens, 0.034)."""
    quantile_bins: int = 1000
    """Number of histogram bins of the quantile rule (Kimi K3: 1000)."""
    sequence_loss: float = 1e-4
    """Weight of the sequence-wise balance loss (DeepSeek-V3, arXiv 2412.19437, eq. 17-20); 0 disables it."""
    global_loss: float = 0.0
    """Weight of the balance loss over the whole batch of a step (arXiv 2501.11873); 0 disables it. A step of several
    micro-batches then first runs an extra forward pass over all of them to count the expert loads."""
    z_loss: float = 0.0
    """Weight of the router z-loss (ST-MoE, arXiv 2202.08906, eq. 5); 0 disables it."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("bias_rate", "sequence_loss", "global_loss", "z_loss"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"model.balance.{name} is {value}: give 0 (off) or more")
        if self.quantile_bins < 2:
            raise ConfigError(f"model.balance.quantile_bins is {self.quantile_bins}: give at least 2, such as 1000")
        if not 0 <= self.bias_still_share <= 1:
            raise ConfigError(f"model.balance.bias_still_share is {self.bias_still_share}: give a share from 0 to 1")

    def at(self, step: int, *, steps: int) -> "BalanceConfig":
        """Return the config that applies in optimizer step `step` (from 0) of `steps`: without a rule once the bias is
        frozen.
        """
        if step < steps - round(self.bias_still_share * steps):
            return self
        return replace(self, bias_rule=BiasRule.none, bias_rate=0.0)


_RANGES = {
    COUNT: (
        *("vocab_size", "hidden_size", "num_layers", "num_heads", "q_lora_rank", "kv_lora_rank"),
        *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "intermediate_size", "moe_intermediate_size"),
        *("num_experts", "num_groups", "max_position_embeddings"),
    ),
    NOT_NEGATIVE: ("num_shared_experts", "num_mtp_layers", "initializer_range"),
    POSITIVE: ("rope_theta", "rms_norm_eps", "routed_scaling_factor"),
}


@dataclass(kw_only=True)
class ModelConfig:
    """A sparse Mixture-of-Experts transformer in the shape of DeepSeek-V3 and Kimi K2."""

    vocab_size: int = 1024
    """Vocabulary size: rows of the embedding and of the head."""
    hidden_size: int = 128
    """Width of the residual stream (D)."""
    num_layers: int = 4
    """Number of transformer blocks."""
    num_dense_layers: int = 1
    """Number of blocks, from the first, with a dense feed-forward layer instead of experts."""
    num_mtp_layers: int = 0
    """Modules of multi-token prediction after the last block (DeepSeek-V3, arXiv 2412.19437, section 2.2): module k
    predicts the token after the next k tokens. Their loss is set by train.mtp."""
    num_heads: int = 4
    """Number of attention heads (H)."""
    q_lora_rank: int | None = 96
    """Rank of the compressed queries; null projects queries without compression."""
    kv_lora_rank: int = 64
    """Rank of the compressed keys and values; a KV cache stores this latent and the rotary key."""
    qk_nope_head_dim: int = 32
    """Query-key width per head without position."""
    qk_rope_head_dim: int = 16
    """Query-key width per head with rotary position; all heads share the key's part."""
    v_head_dim: int = 32
    """Value width per head."""
    intermediate_size: int = 256
    """Width of a dense feed-forward layer."""
    moe_intermediate_size: int = 64
    """Width of one routed expert (F)."""
    num_experts: int = 8
    """Routed experts per layer (E)."""
    num_experts_per_token: int = 2
    """Routed experts chosen per token (K)."""
    num_shared_experts: int = 1
    """Number of experts that process every token; stored as one expert of num_shared_experts times the width."""
    num_groups: int = 1
    """Number of expert groups for group-limited routing."""
    num_groups_per_token: int = 1
    """Number of groups from which a token's experts are chosen."""
    score_function: ScoreFunction = ScoreFunction.sigmoid
    """Function that turns router logits into scores."""
    normalize_weights: bool = True
    """Divide the chosen experts' scores by their sum."""
    routed_scaling_factor: float | None = None
    """Factor on the routed output; null derives it from num_experts and num_experts_per_token (Moonlight, app. C)."""
    rope_theta: float = 50000.0
    """Base of the rotary frequencies."""
    yarn: YarnConfig = field(default_factory=YarnConfig)
    """Context extension (YaRN)."""
    rms_norm_eps: float = 1e-5
    """Epsilon of the RMS norms (the latent norms use 1e-6, as in transformers)."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    max_position_embeddings: int = 2048
    """Maximum sequence length, as declared in the config."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    """Load balancing."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(self, prefix="model.", ranges=_RANGES)
        if self.qk_rope_head_dim % 2:
            raise ConfigError(f"model.qk_rope_head_dim is {self.qk_rope_head_dim}: rotation needs an even number")
        if not 0 <= self.num_dense_layers <= self.num_layers:
            raise ConfigError(
                f"model.num_dense_layers is {self.num_dense_layers}: give 0 to {self.num_layers} (model.num_layers)"
            )
        if not 1 <= self.num_experts_per_token <= self.num_experts:
            raise ConfigError(
                f"model.num_experts_per_token is {self.num_experts_per_token}: "
                f"give 1 to {self.num_experts} (model.num_experts)"
            )
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise ConfigError(
                f"model.num_groups is {self.num_groups}: it must divide model.num_experts={self.num_experts}"
            )
        if not 1 <= self.num_groups_per_token <= self.num_groups:
            raise ConfigError(
                f"model.num_groups_per_token is {self.num_groups_per_token}: give 1 to {self.num_groups} (num_groups)"
            )
        if self.num_groups_per_token * (self.num_experts // self.num_groups) < self.num_experts_per_token:
            raise ConfigError(
                f"model.num_experts_per_token is {self.num_experts_per_token}: "
                f"{self.num_groups_per_token} of {self.num_groups} groups hold fewer experts"
            )
        if self.balance.bias_rule is BiasRule.quantile:
            self._check_quantile()

    def _check_quantile(self) -> None:
        """Raise ConfigError where the quantile rule cannot work: without a next best expert, or with groups."""
        if self.num_experts_per_token == self.num_experts:
            raise ConfigError(
                f"model.balance.bias_rule is quantile: every token visits all {self.num_experts} experts, "
                "so there is nothing to balance. Give model.balance.bias_rule=none"
            )
        if self.num_groups > 1:
            raise ConfigError(
                f"model.balance.bias_rule is quantile and model.num_groups is {self.num_groups}: in groups the bias of "
                "one expert changes which others can be chosen, which the rule ignores. Give sign, centred or 1 group"
            )

    @property
    def num_moe_layers(self) -> int:
        """Number of blocks with routed experts."""
        return self.num_layers - self.num_dense_layers

    @property
    def qk_head_dim(self) -> int:
        """Query-key width per head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Scale of the attention logits, including YaRN's correction."""
        mscale = 0.1 * self.yarn.mscale_all_dim * math.log(self.yarn.factor) + 1.0 if self.yarn.factor > 1 else 1.0
        return float(self.qk_head_dim**-0.5) * mscale * mscale
