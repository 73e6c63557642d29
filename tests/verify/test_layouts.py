"""`verify layouts` on its smallest cases: the bounds are kept, and each fault that is planted misses one."""

from pathlib import Path

import pytest

from moetrain.commands import LayoutFault, LayoutScenario, VerifyLayoutsRun
from moetrain.compose import compose, save_config
from moetrain.errors import BoundError, ConfigError
from moetrain.model.config import Recompute
from moetrain.optim.config import OptimizerName
from moetrain.parallel.config import EngineName
from moetrain.verify.layout_cases import Layout, Order, Trace, layouts_of, make_batch, make_engine, take_steps
from moetrain.verify.layouts import STEP_BOUND, Outcome, Reference, differences, rows_of, verify_layouts
from moetrain.verify.table import check_rows

PLAIN = Layout(
    optimizer=OptimizerName.muon,
    scenario=LayoutScenario.routed,
    world_size=1,
    expert=1,
    zero=3,
    accumulation=2,
    recompute=Recompute.blocks,
)


def _run(*overrides: str) -> VerifyLayoutsRun:
    run: VerifyLayoutsRun = compose("verify layouts", ["rows=4", "seq_len=8", "steps=2", *overrides])
    return run


def test_two_ranks_with_split_experts_and_weights_and_limited_rows_keep_every_bound(tmp_path: Path) -> None:
    run = _run("world_sizes=[2]", "experts=[2]", "zeros=[3]", "accumulations=[1,2]", "recomputes=[blocks]")
    run.expert_rows = 16
    run.optimizers = [OptimizerName.muon]
    save_config(run, tmp_path / "config.yaml")
    outcome = verify_layouts(run, folder=tmp_path)
    assert len(outcome.gaps) + len(outcome.left_out) == 4
    assert outcome.gaps
    check_rows(rows_of(outcome))


@pytest.mark.parametrize("fault", [fault for fault in LayoutFault if fault is not LayoutFault.none])
def test_a_planted_fault_is_found(fault: LayoutFault) -> None:
    run = _run("world_sizes=[1]")
    traces = {
        planted: take_steps(
            run,
            make_engine(run, PLAIN, engine=EngineName.deepspeed),
            accumulation=2,
            order=Order.whole,
            fault=planted,
        )
        for planted in (LayoutFault.none, fault)
    }
    expected = take_steps(
        run,
        make_engine(run, PLAIN, engine=EngineName.torch),
        accumulation=1,
        order=Order.whole,
        fault=LayoutFault.none,
    )
    assert max(differences(traces[LayoutFault.none], expected).values()) < STEP_BOUND
    assert max(differences(traces[fault], expected).values()) > STEP_BOUND


def test_nothing_compared_is_a_miss() -> None:
    empty = Trace(loss=[], grad_norm=[], clip_factor=[], bias=[], loads=[])
    noise = dict.fromkeys(("loss", "grad_norm", "clip_factor", "bias", "loads", "weights"), 0.0)
    reference = Reference(trace=empty, noise=noise, margin=0.0, coin_flip=1.0)
    assert not reference.is_decided
    with pytest.raises(BoundError, match="loss"):
        check_rows(rows_of(Outcome(references={"muon.routed": reference}, gaps={}, left_out=[PLAIN])))


def test_all_valid_combinations_are_listed_and_half_the_rows_are_sometimes_empty() -> None:
    run: VerifyLayoutsRun = compose("verify layouts", [])
    assert len(layouts_of(run)) == 6 * 3 * 2 * 2 * 2 * 2
    assert int((make_batch(run, 1).segments_BT[run.rows // 2 :] > 0).sum()) == 0
    with pytest.raises(ConfigError, match="rows is 6"):
        compose("verify layouts", ["rows=6"])
