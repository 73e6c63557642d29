"""The plan of a stage against counts made one by one."""

from dataclasses import replace

import pytest

from moetrain.model.config import ModelConfig, Recompute
from moetrain.model.flops import flops_per_token, num_parameters
from moetrain.optim.config import OptimConfig, OptimizerName
from moetrain.parallel.config import ParallelConfig
from moetrain.plan.stage import UTILISATION, StagePlan, plan_stage

MODEL = ModelConfig()
COUNTS = num_parameters(MODEL)


def plan(
    *,
    model: ModelConfig = MODEL,
    optim: OptimizerName = OptimizerName.adamw,
    expert: int = 1,
    zero: int = 1,
    ranks: int = 1,
    recompute: Recompute = Recompute.none,
) -> StagePlan:
    return plan_stage(
        model,
        optim=OptimConfig(name=optim),
        parallel=ParallelConfig(expert=expert, zero=zero, recompute=recompute),
        world_size=ranks,
        tokens=1000,
        seq_len=128,
        tokens_in_memory=256,
    )


def test_one_rank_holds_masters_gradients_and_two_moments_in_float32() -> None:
    found = plan()
    assert found.bytes_parameters == COUNTS.total * (4 + 2)
    assert found.bytes_gradients == COUNTS.total * 4
    assert found.bytes_optimizer == COUNTS.total * 8
    assert found.bytes_total > found.bytes_parameters + found.bytes_gradients + found.bytes_optimizer


def test_muon_keeps_one_state_but_for_the_embeddings() -> None:
    embeddings = 2 * MODEL.vocab_size * MODEL.hidden_size
    assert plan(optim=OptimizerName.muon).bytes_optimizer == (COUNTS.total - embeddings) * 4 + embeddings * 8


def test_expert_parallelism_halves_the_experts_of_a_rank_and_zero_shards_the_rest() -> None:
    dense = COUNTS.total - COUNTS.routed
    found = plan(expert=2, ranks=2)
    assert found.bytes_parameters == (dense + COUNTS.routed // 2) * 6
    assert found.bytes_gradients == (dense + COUNTS.routed // 2) * 4
    assert found.bytes_optimizer == (dense // 2 + COUNTS.routed // 2) * 8
    assert plan(expert=2, ranks=2, zero=2).bytes_gradients == COUNTS.total // 2 * 4


# Hidden size 128, 8 experts of width 64 in a layer: the largest unit is a layer's experts, or an embedding.
@pytest.mark.parametrize(
    ("expert", "vocab_size", "unit"), [(1, 1024, 8 * 3 * 128 * 64), (2, 1024, 1024 * 128), (2, 512, 4 * 3 * 128 * 64)]
)
def test_zero_3_keeps_owned_parts_and_one_unit_whole(expert: int, vocab_size: int, unit: int) -> None:
    model = replace(MODEL, vocab_size=vocab_size)
    counts = num_parameters(model)
    held = counts.total - counts.routed + counts.routed // expert
    owned = counts.total // 2
    found = plan(model=model, expert=expert, ranks=2, zero=3)
    assert found.bytes_parameters == (owned + unit) * 4 + held * 2  # casts stay until the backward pass
    assert found.bytes_gradients == owned * 4
    assert found.bytes_optimizer == owned * 8
    again = plan(model=model, expert=expert, ranks=2, zero=3, recompute=Recompute.blocks)
    assert again.bytes_parameters == (owned + unit) * 4 + unit * 2
    assert again.bytes_optimizer == found.bytes_optimizer


@pytest.mark.parametrize("zero", [1, 3])
def test_recomputed_blocks_keep_four_inputs_each_and_one_block_whole(zero: int) -> None:
    kept, again = (plan(zero=zero, recompute=recompute).bytes_activations for recompute in Recompute)
    assert kept == 256 * MODEL.hidden_size * MODEL.num_layers * 20 * 2
    assert again == 256 * MODEL.hidden_size * ((MODEL.num_layers - 1) * 4 + 20) * 2


def test_time_is_operations_over_the_speed() -> None:
    found = plan()
    assert found.flops == 1000 * flops_per_token(MODEL, 128)
    assert found.seconds(1e9) == found.flops / (1e9 * UTILISATION)
