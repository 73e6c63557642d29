"""Experts made of a dense layer compute what it computed, whatever the router chooses."""

from dataclasses import replace

import pytest
import torch

from moetrain.errors import ConfigError
from moetrain.model.config import ModelConfig, ScoreFunction
from moetrain.model.moe import MoE
from moetrain.model.transformer import Transformer, initialize
from moetrain.upcycle.config import SharedStart, UpcycleConfig, UpcycleMethod, UpcyclePlan, plan_upcycling
from moetrain.upcycle.tensors import UpcycledTensors, layer_change

UNITS = 48
SPLIT, PART = UpcycleMethod.split, SharedStart.part


def shape(*, num_dense_layers: int = 3, **fields: object) -> ModelConfig:
    small = {"vocab_size": 67, "hidden_size": 32, "num_layers": 3, "num_heads": 2, "q_lora_rank": None}
    heads = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    wide = {"intermediate_size": UNITS, "initializer_range": 0.2, "max_position_embeddings": 64}
    return ModelConfig(**{**small, **heads, **wide, "num_dense_layers": num_dense_layers, **fields})  # type: ignore[arg-type]


CASES: dict[str, tuple[dict[str, object], UpcycleConfig]] = {
    "copies": ({"moe_intermediate_size": 48, "num_experts": 8}, UpcycleConfig()),
    "copies without a shared expert": (
        {"moe_intermediate_size": 48, "num_experts": 8, "num_shared_experts": 0},
        UpcycleConfig(),
    ),
    "copies of all layers": ({"moe_intermediate_size": 48, "num_dense_layers": 0}, UpcycleConfig()),
    "copies beside a shared part": (
        {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_token": 3},
        UpcycleConfig(shared=PART),
    ),
    "softmax copies": (
        {"moe_intermediate_size": 48, "score_function": ScoreFunction.softmax, "routed_scaling_factor": 2.5},
        UpcycleConfig(),
    ),
    "softmax copies with weights as they are": (
        {
            "moe_intermediate_size": 48,
            "score_function": ScoreFunction.softmax,
            "normalize_weights": False,
            "routed_scaling_factor": 1.5,
        },
        UpcycleConfig(router_std=0.0),
    ),
    "one copy of each shard": (
        {"moe_intermediate_size": 12, "num_experts": 16, "num_experts_per_token": 4},
        UpcycleConfig(method=SPLIT),
    ),
    "two copies of each shard": (
        {"moe_intermediate_size": 16, "num_experts": 12, "num_experts_per_token": 6},
        UpcycleConfig(method=SPLIT),
    ),
    "softmax shards": (
        {
            "moe_intermediate_size": 12,
            "num_experts": 16,
            "num_experts_per_token": 8,
            "score_function": ScoreFunction.softmax,
        },
        UpcycleConfig(method=SPLIT),
    ),
    "sqrt-softplus shards": (
        {
            "moe_intermediate_size": 16,
            "num_experts": 12,
            "num_experts_per_token": 6,
            "score_function": ScoreFunction.sqrt_softplus,
        },
        UpcycleConfig(method=SPLIT),
    ),
    "shards beside two shared experts": (
        {"moe_intermediate_size": 8, "num_experts": 16, "num_experts_per_token": 4, "num_shared_experts": 2},
        UpcycleConfig(method=SPLIT, shared=PART),
    ),
    "shards in node groups": (
        {
            "moe_intermediate_size": 24,
            "num_experts": 16,
            "num_experts_per_token": 4,
            "num_groups": 4,
            "num_groups_per_token": 2,
        },
        UpcycleConfig(method=SPLIT),
    ),
    "whole groups with a router of zeros": (
        {
            "moe_intermediate_size": 12,
            "num_experts": 16,
            "num_experts_per_token": 8,
            "num_groups": 4,
            "num_groups_per_token": 2,
        },
        UpcycleConfig(method=SPLIT, router_std=0.0),
    ),
}


def dense_model() -> Transformer:
    model = Transformer(shape(), compute_dtype=torch.float32)
    initialize(model, seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(len(name)))
    return model


def sparse_model(fields: dict[str, object], config: UpcycleConfig) -> tuple[Transformer, UpcyclePlan]:
    model = shape(**{"num_dense_layers": 1, **fields})  # type: ignore[arg-type]
    plan = plan_upcycling(model, config)
    sparse = Transformer(model, compute_dtype=torch.float32)
    sparse.load_state_dict(dict(UpcycledTensors(dense_model().state_dict(), model=model, plan=plan, seed=7)))
    return sparse, plan


@torch.no_grad()
def logits(model: Transformer) -> torch.Tensor:
    tokens_BT = torch.randint(0, 67, (8, 48), generator=torch.Generator().manual_seed(1))
    segments_BT = torch.ones_like(tokens_BT)
    positions_BT = torch.arange(48).repeat(8, 1)
    output = model(tokens_BT, segments_BT=segments_BT, positions_BT=positions_BT)
    return model.logits(output.hidden_BTD.flatten(0, 1))


def assert_equal_outputs(sparse: Transformer) -> None:
    expected, found = logits(dense_model()), logits(sparse)
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("name", list(CASES))
def test_the_sparse_model_has_the_logits_of_the_dense_one(name: str) -> None:
    sparse, _ = sparse_model(*CASES[name])
    assert_equal_outputs(sparse)


@pytest.mark.parametrize("name", list(CASES))
def test_each_layer_alone_has_the_output_of_the_dense_one(name: str) -> None:
    sparse, plan = sparse_model(*CASES[name])
    dense, tensors, model = dense_model().state_dict(), sparse.state_dict(), sparse.config
    for layer in range(model.num_dense_layers, 3):
        change = layer_change(dense, tensors, layer=layer, model=model, plan=plan, num_tokens=512)
        assert change.relative < 1e-5
        assert change.num_cut == 0


def randomize_routers(sparse: Transformer, *, rows: int, std: float) -> None:
    """Draw other router weights and balance biases, the same for each `rows` experts that follow each other."""
    stream = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, layer in sparse.moe_layers():
            weight_ED, bias_E = layer.gate.weight, layer.gate.e_score_correction_bias
            drawn_CD = torch.empty(len(weight_ED) // rows, weight_ED.shape[1]).normal_(std=std, generator=stream)
            weight_ED.copy_(drawn_CD.repeat_interleave(rows, dim=0))
            drawn_C = torch.empty(len(weight_ED) // rows).normal_(std=0.1, generator=stream)
            bias_E.copy_(drawn_C.repeat_interleave(rows))


@pytest.mark.parametrize("name", [name for name in CASES if name != "softmax copies with weights as they are"])
def test_any_other_router_that_scores_the_shards_of_a_copy_alike_gives_the_same_output(name: str) -> None:
    sparse, plan = sparse_model(*CASES[name])
    before = [routing_of(layer) for _, layer in sparse.moe_layers()]
    randomize_routers(sparse, rows=plan.num_shards, std=0.3)
    after = [routing_of(layer) for _, layer in sparse.moe_layers()]
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert_equal_outputs(sparse)


@torch.no_grad()
def routing_of(layer: MoE) -> torch.Tensor:
    x_ND = torch.empty(64, 32).normal_(generator=torch.Generator().manual_seed(2))
    return layer.gate(x_ND).expert_ids_NK.sort(dim=1).values


def test_a_router_that_scores_the_shards_of_a_copy_apart_is_found_by_the_check() -> None:
    sparse, plan = sparse_model(*CASES["two copies of each shard"])
    tensors = sparse.state_dict()
    dense, model = dense_model().state_dict(), sparse.config
    tensors["model.layers.1.mlp.gate.weight"][0] += 0.01
    change = layer_change(dense, tensors, layer=1, model=model, plan=plan, num_tokens=512)
    assert change.relative > 1e-4
    tensors["model.layers.1.mlp.gate.weight"][0] -= 1.0
    change = layer_change(dense, tensors, layer=1, model=model, plan=plan, num_tokens=512)
    assert change.num_cut > 0


def test_a_factor_left_out_is_found_by_the_check() -> None:
    sparse, plan = sparse_model(*CASES["copies"])
    tensors = sparse.state_dict()
    tensors["model.layers.2.mlp.experts.down_proj"] /= plan.down_scale
    change = layer_change(dense_model().state_dict(), tensors, layer=2, model=sparse.config, plan=plan, num_tokens=64)
    assert change.relative > 0.1


def test_the_shards_of_a_copy_and_the_shared_part_are_the_units_of_the_dense_layer() -> None:
    sparse, plan = sparse_model(*CASES["shards beside two shared experts"])
    tensors, dense = sparse.state_dict(), dense_model().state_dict()
    mlp, width = "model.layers.1.mlp", 8
    for copy in range(plan.num_copies):
        own = slice(copy * plan.num_shards, (copy + 1) * plan.num_shards)
        gate_up, down = tensors[f"{mlp}.experts.gate_up_proj"][own], tensors[f"{mlp}.experts.down_proj"][own]
        shared = {kind: tensors[f"{mlp}.shared_experts.{kind}_proj.weight"] for kind in ("gate", "up", "down")}
        assert torch.equal(torch.cat([shared["gate"], *gate_up[:, :width]]), dense[f"{mlp}.gate_proj.weight"])
        assert torch.equal(torch.cat([shared["up"], *gate_up[:, width:]]), dense[f"{mlp}.up_proj.weight"])
        whole = torch.cat([shared["down"], *(down / plan.down_scale)], dim=1)
        torch.testing.assert_close(whole, dense[f"{mlp}.down_proj.weight"], rtol=1e-6, atol=0)


def test_copies_get_routers_of_their_own_and_shared_experts_that_are_not_a_part_begin_at_zero() -> None:
    sparse, plan = sparse_model(*CASES["one copy of each shard"])
    _, layer = sparse.moe_layers()[0]
    rows = layer.gate.weight.detach()
    assert len(torch.unique(rows, dim=0)) == plan.num_copies
    assert not layer.shared_experts.down_proj.weight.any()
    assert layer.shared_experts.gate_proj.weight.all()
    assert not layer.gate.e_score_correction_bias.any()


def test_kimi_k2_divides_as_its_dense_layer_does() -> None:
    model = replace(
        shape(num_dense_layers=1, intermediate_size=18432, moe_intermediate_size=2048, num_experts=384),
        num_experts_per_token=8,
        routed_scaling_factor=2.827,
    )
    plan = plan_upcycling(model, UpcycleConfig(method=SPLIT, shared=PART))
    assert (plan.num_shards, plan.num_copies, plan.num_shared_units) == (8, 48, 2048)
    assert plan.down_scale == pytest.approx(8 / 2.827)


@pytest.mark.parametrize(
    ("fields", "config", "said"),
    [
        ({"num_dense_layers": 3}, UpcycleConfig(), "num_dense_layers is 3: give fewer"),
        ({"moe_intermediate_size": 20}, UpcycleConfig(method=SPLIT), "moe_intermediate_size is 20: it must divide"),
        ({"moe_intermediate_size": 96}, UpcycleConfig(), "moe_intermediate_size is 96: it must divide"),
        ({"moe_intermediate_size": 48}, UpcycleConfig(shared=PART), "must divide the 0 routed units"),
        ({"moe_intermediate_size": 24}, UpcycleConfig(), r"method is copy and .* give 48, .*split for 2 shards"),
        ({"moe_intermediate_size": 48}, UpcycleConfig(method=SPLIT), "method is split and .* all of the routed units"),
        (
            {"moe_intermediate_size": 16, "num_experts": 8},
            UpcycleConfig(method=SPLIT),
            "num_experts is 8: give a multiple of the 3 shards",
        ),
        (
            {"moe_intermediate_size": 16, "num_experts": 12, "num_experts_per_token": 4},
            UpcycleConfig(method=SPLIT),
            "num_experts_per_token is 4: give a multiple of the 3 shards",
        ),
        (
            {"moe_intermediate_size": 12, "num_experts": 8, "num_groups": 4, "num_experts_per_token": 4}
            | {"num_groups_per_token": 4},
            UpcycleConfig(method=SPLIT),
            "num_groups is 4: its groups of 2 experts must hold whole copies of 4 shards",
        ),
        (
            {"moe_intermediate_size": 48, "normalize_weights": False, "routed_scaling_factor": 1.0},
            UpcycleConfig(),
            "normalize_weights is false and upcycle.router_std is 0.2",
        ),
        (
            {"moe_intermediate_size": 24, "num_experts": 8},
            UpcycleConfig(method=SPLIT, router_std=0.0),
            "router_std is 0 and there are 2 shards: .* model.num_groups=4",
        ),
    ],
)
def test_a_shape_that_does_not_divide_is_refused_by_name(
    fields: dict[str, object], config: UpcycleConfig, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        plan_upcycling(shape(**{"num_dense_layers": 1, **fields}), config)  # type: ignore[arg-type]


def test_settings_out_of_range_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"upcycle.router_std is -1"):
        UpcycleConfig(router_std=-1.0)
    with pytest.raises(ConfigError, match=r"upcycle.check_tokens is -1"):
        UpcycleConfig(check_tokens=-1)
