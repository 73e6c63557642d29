"""The shape of the transformer: every number of the DeepSeek-V3 / Kimi K2 architecture. No torch here."""

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
    """How the aux-loss-free balance bias moves after a step (arXiv 2408.15664; `centred`: Moonlight, appendix C;
    `quantile`: Kimi K3, appendix D, without a rate)."""

    none = "none"
    sign = "sign"
    centred = "centred"
    quantile = "quantile"


class Recompute(StrEnum):
    """What is computed again in the backward pass instead of kept: nothing, or attention, feed-forward and experts."""

    none = "none"
    blocks = "blocks"


@dataclass(kw_only=True)
class YarnConfig:
    """Context extension by YaRN (arXiv 2309.00071). factor 1 switches it off."""

    factor: float = 1.0
    """How many times longer the context is than the one trained on."""
    original_max_position: int = 4096
    """Positions the model was trained on before extension."""
    beta_fast: float = 1.0
    """Rotations above which a frequency is left untouched (K2: 1, DeepSeek-V3: 32)."""
    beta_slow: float = 1.0
    """Rotations below which a frequency is divided by factor."""
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
    """How tokens are spread over experts."""

    bias_rule: BiasRule = BiasRule.centred
    """Rule that moves the router's bias after each step."""
    bias_rate: float = 1e-3
    """Step of the bias update (sign, centred)."""
    bias_still_share: float = 0.0
    """Share of the steps, the last ones, in which the bias stands still, its rate being 0 (DeepSeek-V3, arXiv
    2412.19437, section 4.2: 500B of 14.8T tokens, 0.034)."""
    quantile_bins: int = 1000
    """Bins of the histogram in which the quantile rule counts (Kimi K3: 1000)."""
    sequence_loss: float = 1e-4
    """Weight of the sequence-wise balance loss (DeepSeek-V3, arXiv 2412.19437, eq. 17-20); 0 switches it off."""
    global_loss: float = 0.0
    """Weight of the balance loss over the whole batch of a step (arXiv 2501.11873); 0 switches it off. A step of
    several micro-batches then starts with a forward pass over all of them that only counts."""
    z_loss: float = 0.0
    """Weight of the router z-loss (ST-MoE, arXiv 2202.08906, eq. 5); 0 switches it off."""

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
        """Return what holds in optimizer step `step`, from 0, of a run of `steps`: no rule once it stands still."""
        if step < steps - round(self.bias_still_share * steps):
            return self
        return replace(self, bias_rule=BiasRule.none, bias_rate=0.0)


_RANGES = {
    COUNT: (
        *("vocab_size", "hidden_size", "num_layers", "num_heads", "q_lora_rank", "kv_lora_rank"),
        *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "intermediate_size", "moe_intermediate_size"),
        *("num_experts", "num_groups", "max_position_embeddings"),
    ),
    NOT_NEGATIVE: ("num_shared_experts", "initializer_range"),
    POSITIVE: ("rope_theta", "rms_norm_eps", "routed_scaling_factor"),
}


@dataclass(kw_only=True)
class ModelConfig:
    """A sparse Mixture-of-Experts transformer in the shape of DeepSeek-V3 and Kimi K2."""

    vocab_size: int = 1024
    """Rows of the embedding and of the head."""
    hidden_size: int = 128
    """Width of the residual stream (D)."""
    num_layers: int = 4
    """Transformer blocks."""
    num_dense_layers: int = 1
    """First blocks with a dense feed-forward layer in place of experts."""
    num_heads: int = 4
    """Attention heads (H)."""
    q_lora_rank: int | None = 96
    """Rank of the compressed queries; null projects queries directly."""
    kv_lora_rank: int = 64
    """Rank of the compressed keys and values: what the KV cache holds, with the rope key."""
    qk_nope_head_dim: int = 32
    """Query-key width a head without position."""
    qk_rope_head_dim: int = 16
    """Query-key width a head with rotary position; the key's part is shared by all heads."""
    v_head_dim: int = 32
    """Value width a head."""
    intermediate_size: int = 256
    """Width of a dense feed-forward layer."""
    moe_intermediate_size: int = 64
    """Width of one routed expert (F)."""
    num_experts: int = 8
    """Routed experts a layer (E)."""
    num_experts_per_token: int = 2
    """Routed experts that each token visits (K)."""
    num_shared_experts: int = 1
    """Experts that every token visits; stored as one expert of that many times the width."""
    num_groups: int = 1
    """Groups that the experts are divided into for group-limited routing."""
    num_groups_per_token: int = 1
    """Groups among which a token's experts are chosen."""
    score_function: ScoreFunction = ScoreFunction.sigmoid
    """Router score function."""
    normalize_weights: bool = True
    """Divide the chosen scores by their sum."""
    routed_scaling_factor: float | None = None
    """Factor on the routed output; null derives it from num_experts and num_experts_per_token (Moonlight, app. C)."""
    rope_theta: float = 50000.0
    """Base of the rotary frequencies."""
    yarn: YarnConfig = field(default_factory=YarnConfig)
    """Context extension."""
    rms_norm_eps: float = 1e-5
    """Epsilon of the RMS norms (the latent norms use 1e-6, as transformers does)."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    max_position_embeddings: int = 2048
    """Longest sequence the model is declared for."""
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
        """Check what the quantile rule needs: a next best expert, and a choice that depends on each bias alone."""
        if self.num_experts_per_token == self.num_experts:
            raise ConfigError(
                f"model.balance.bias_rule is quantile: every token visits all {self.num_experts} experts, "
                "there is nothing to balance; give none"
            )
        if self.num_groups > 1:
            raise ConfigError(
                f"model.balance.bias_rule is quantile and model.num_groups is {self.num_groups}: in groups the bias of "
                "one expert opens or closes others, which the quantile does not see; give sign or centred, or 1 group"
            )

    @property
    def num_moe_layers(self) -> int:
        """Blocks with routed experts."""
        return self.num_layers - self.num_dense_layers

    @property
    def qk_head_dim(self) -> int:
        """Query-key width a head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Scale of the attention logits, YaRN's correction included."""
        mscale = 0.1 * self.yarn.mscale_all_dim * math.log(self.yarn.factor) + 1.0 if self.yarn.factor > 1 else 1.0
        return float(self.qk_head_dim**-0.5) * mscale * mscale
