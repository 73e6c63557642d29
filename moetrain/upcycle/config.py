"""How a dense feed-forward layer becomes experts: the config, and the plan that follows from it. Imports no torch.

A feed-forward layer of I units is a sum over its units, so splitting the units into shards is exact. With F units per
expert, `copy` makes every expert a copy of the whole layer (arXiv 2212.05055); `split` makes every expert one of G
shards, with E / G copies of each shard (fine-grained: arXiv 2401.06066, 2410.07524).
"""

import math
from dataclasses import dataclass
from enum import StrEnum

from moetrain.errors import ConfigError
from moetrain.model.config import ModelConfig, ScoreFunction
from moetrain.model.gate_scale import routed_scaling_factor

NEW_FIELDS = (
    *("num_dense_layers", "moe_intermediate_size", "num_experts", "num_experts_per_token", "num_shared_experts"),
    *("num_groups", "num_groups_per_token", "score_function", "normalize_weights", "routed_scaling_factor"),
    *("initializer_range", "max_position_embeddings", "num_mtp_layers", "balance."),
)
"""Fields of the model that may differ from the dense one: what the experts are, and what changes no output."""


class UpcycleMethod(StrEnum):
    """Initial content of an expert: a copy of all routed units, or one shard of them."""

    # The names may shadow methods such as str.split, which nothing calls on members.
    copy = "copy"
    split = "split"  # type: ignore[assignment]


class SharedStart(StrEnum):
    """Initial content of the shared experts."""

    zero = "zero"
    part = "part"


@dataclass(kw_only=True)
class UpcycleConfig:
    """Upcycling of a dense checkpoint to a Mixture-of-Experts model with the same output."""

    method: UpcycleMethod = UpcycleMethod.copy
    """copy: every expert is the dense layer. split: the layer is split into shards, and every expert is one of them."""
    shared: SharedStart = SharedStart.zero
    """Initial shared experts. zero: their output is 0, and all units are routed. part: they take the first units of the
    dense layer, as many as they are wide, and only the other units are routed."""
    router_std: float | None = None
    """Standard deviation of the router weights; null uses model.initializer_range. All shards of a copy share one
    router row; each copy has its own random row. With 0 all copies tie, so every token chooses the same ones."""
    check_tokens: int = 256
    """Number of random tokens on which each layer is compared with the dense one before anything is written; 0 disables
    the check."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.router_std is not None and self.router_std < 0:
            raise ConfigError(f"upcycle.router_std is {self.router_std}: give 0 or more, or null")
        if self.check_tokens < 0:
            raise ConfigError(f"upcycle.check_tokens is {self.check_tokens}: give 0 or more")


@dataclass(frozen=True, kw_only=True)
class UpcyclePlan:
    """The plan derived from shape and config. Expert e is shard e % num_shards of copy e // num_shards."""

    num_shared_units: int
    """Number of units of the dense layer, from the first, that become the shared experts."""
    num_shards: int
    """Number of shards of the other units; 1 for copies."""
    num_copies: int
    """Number of experts with the same shard."""
    down_scale: float
    """Factor on the routed experts' down projections that makes the weighted sum equal the dense layer."""
    router_std: float
    """Standard deviation of the router's rows."""
    has_whole_groups: bool
    """Whether group-limited routing guarantees that every choice consists of whole copies, even with ties."""


def plan_upcycling(model: ModelConfig, upcycle: UpcycleConfig) -> UpcyclePlan:
    """Return the plan that turns a dense model with layers of `model.intermediate_size` units into the shape `model`.

    Raises ConfigError that names the field if the sizes do not divide.
    """
    width, num_chosen = model.moe_intermediate_size, model.num_experts_per_token
    if model.num_mtp_layers:
        raise ConfigError(
            f"model.num_mtp_layers is {model.num_mtp_layers}: upcycling makes no modules of multi-token prediction; "
            "give model.num_mtp_layers=0"
        )
    if not model.num_moe_layers:
        raise ConfigError(
            f"model.num_dense_layers is {model.num_dense_layers}: give fewer than model.num_layers={model.num_layers}, "
            "because only the other layers get experts"
        )
    shared = width * model.num_shared_experts if upcycle.shared is SharedStart.part else 0
    routed = model.intermediate_size - shared
    if routed < width or routed % width:
        raise ConfigError(
            f"model.moe_intermediate_size is {width}: it must divide the {routed} routed units "
            f"(model.intermediate_size={model.intermediate_size}, of which {shared} are the shared experts' part)"
        )
    num_shards = routed // width
    if upcycle.method is UpcycleMethod.copy and num_shards > 1:
        raise ConfigError(
            f"upcycle.method is copy and model.moe_intermediate_size is {width}: give {routed}, the routed units, or "
            f"upcycle.method=split for {num_shards} shards"
        )
    if upcycle.method is UpcycleMethod.split and num_shards == 1:
        raise ConfigError(
            f"upcycle.method is split and model.moe_intermediate_size is {width}, all of the routed units: give a "
            "divisor of it, or upcycle.method=copy"
        )
    for name in ("num_experts", "num_experts_per_token"):
        if getattr(model, name) % num_shards:
            raise ConfigError(f"model.{name} is {getattr(model, name)}: give a multiple of the {num_shards} shards")
    in_group = model.num_experts // model.num_groups
    if model.num_groups > 1 and in_group % num_shards:
        raise ConfigError(
            f"model.num_groups is {model.num_groups}: its groups of {in_group} experts must hold whole copies of "
            f"{num_shards} shards"
        )
    whole = in_group == num_shards and model.num_groups_per_token * num_shards == num_chosen
    std = model.initializer_range if upcycle.router_std is None else upcycle.router_std
    _check_router(model, std=std, num_shards=num_shards, has_whole_groups=whole)
    sum_of_weights = 1.0 if model.normalize_weights else num_chosen * _score_at_zero(model)
    return UpcyclePlan(
        num_shared_units=shared,
        num_shards=num_shards,
        num_copies=model.num_experts // num_shards,
        down_scale=num_shards / (sum_of_weights * routed_scaling_factor(model)),
        router_std=std,
        has_whole_groups=whole,
    )


def _check_router(model: ModelConfig, *, std: float, num_shards: int, has_whole_groups: bool) -> None:
    if not model.normalize_weights and std > 0:
        raise ConfigError(
            f"model.normalize_weights is false and upcycle.router_std is {std}: the chosen weights then have no "
            "constant sum, and the output would change; give model.normalize_weights=true or upcycle.router_std=0"
        )
    if std == 0 and num_shards > 1 and not has_whole_groups:
        raise ConfigError(
            f"upcycle.router_std is 0 and there are {num_shards} shards: tied experts could be chosen without their "
            f"copy's other shards; give a positive number, or model.num_groups={model.num_experts // num_shards} and "
            f"model.num_groups_per_token={model.num_experts_per_token // num_shards}"
        )


def _score_at_zero(model: ModelConfig) -> float:
    """Return the score of every expert when all router logits are 0."""
    if model.score_function is ScoreFunction.softmax:
        return 1.0 / model.num_experts
    return 0.5 if model.score_function is ScoreFunction.sigmoid else math.sqrt(math.log(2.0))
