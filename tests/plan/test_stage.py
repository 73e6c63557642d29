"""The plan of a stage against counts made one by one."""

from moetrain.model.config import ModelConfig
from moetrain.model.flops import flops_per_token, num_parameters
from moetrain.optim.config import OptimConfig, OptimizerName
from moetrain.parallel.config import ParallelConfig
from moetrain.plan.stage import UTILISATION, StagePlan, plan_stage

MODEL = ModelConfig()
COUNTS = num_parameters(MODEL)


def plan(*, optim: OptimizerName = OptimizerName.adamw, expert: int = 1, zero: int = 1, ranks: int = 1) -> StagePlan:
    return plan_stage(
        MODEL,
        optim=OptimConfig(name=optim),
        parallel=ParallelConfig(expert=expert, zero=zero),
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


def test_time_is_operations_over_the_speed() -> None:
    found = plan()
    assert found.flops == 1000 * flops_per_token(MODEL, 128)
    assert found.seconds(1e9) == found.flops / (1e9 * UTILISATION)
