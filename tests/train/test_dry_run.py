"""What a stage is said to cost."""

from moetrain.data.config import DataConfig
from moetrain.model.flops import flops_per_token, num_parameters
from moetrain.optim.config import OptimConfig, OptimizerName
from moetrain.quant.config import QuantConfig
from moetrain.train.config import TrainConfig
from moetrain.train.dry_run import dry_run, estimate
from tests.train.toy import toy_model

_TRAIN = TrainConfig(steps=10, rows_per_step=8, rows_per_micro_batch=4)


def test_tokens_flops_and_time_follow_from_the_config() -> None:
    model = toy_model()
    cost = estimate(
        model=model,
        seq_len=64,
        train=_TRAIN,
        optim=OptimConfig(),
        quant=QuantConfig(),
        num_ranks=1,
        peak_flops=1e9,
        share=0.5,
    )
    assert cost.tokens == 10 * 8 * 64
    assert cost.flops == cost.tokens * flops_per_token(model, 64)
    assert cost.seconds == cost.flops / 0.5e9


def test_memory_counts_masters_gradients_optimizer_states_and_compute_weights() -> None:
    model, counts = toy_model(), num_parameters(toy_model())
    sizes = {
        name: estimate(
            model=model,
            seq_len=64,
            train=_TRAIN,
            optim=OptimConfig(name=name),
            quant=QuantConfig(),
            num_ranks=1,
            peak_flops=1.0,
        ).state_bytes
        for name in OptimizerName
    }
    assert sizes[OptimizerName.muon] == counts.total * (4 + 4 + 4 + 2)
    assert sizes[OptimizerName.adamw] == counts.total * (4 + 4 + 8 + 2)


def test_a_dry_run_tells_parameters_memory_tokens_and_time() -> None:
    lines = "\n".join(
        dry_run(
            model=toy_model(),
            data=DataConfig(seq_len=64),
            train=_TRAIN,
            optim=OptimConfig(),
            quant=QuantConfig(),
            num_ranks=1,
        )
    )
    assert f"{num_parameters(toy_model()).total:,} in all" in lines
    assert "5,120 in 10 steps" in lines
    for word in ("active a token", "memory", "matmul peak", "expected time"):
        assert word in lines
