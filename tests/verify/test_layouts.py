"""`verify layouts` on its smallest cases: the bounds are kept, and each fault that is planted misses one."""

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from moetrain.commands.verify import LayoutFault, LayoutScenario, VerifyLayoutsRun
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
    earlier = _run("world_sizes=[2]", "accumulations=[1]", "run.seed=9")
    save_config(earlier, tmp_path / "config.yaml")
    outcome = verify_layouts(run, folder=tmp_path)
    assert len(outcome.gaps) == 4
    check_rows(rows_of(outcome))


@pytest.mark.parametrize("fault", [fault for fault in LayoutFault if fault is not LayoutFault.none])
def test_a_planted_fault_is_found(fault: LayoutFault) -> None:
    run = _run("world_sizes=[1]")
    traces = {
        planted: take_steps(
            run,
            make_engine(run, PLAIN, engine=EngineName.deepspeed),
            layout=PLAIN,
            order=Order.whole,
            fault=planted,
        )
        for planted in (LayoutFault.none, fault)
    }
    expected = take_steps(
        run,
        make_engine(run, PLAIN, engine=EngineName.torch),
        layout=replace(PLAIN, accumulation=1),
        order=Order.whole,
        fault=LayoutFault.none,
    )
    assert max(differences(traces[LayoutFault.none], expected).values()) < STEP_BOUND
    found = differences(traces[fault], expected)
    assert max(found.values()) > STEP_BOUND
    if fault is LayoutFault.norm_without_experts:
        assert {figure for figure, gap in found.items() if gap > STEP_BOUND} == {"grad_norm", "clip_factor"}


def test_a_norm_without_experts_is_the_same_however_experts_are_split(tmp_path: Path) -> None:
    run = _run("world_sizes=[2]", "experts=[1,2]", "zeros=[2,3]", "accumulations=[2]", "recomputes=[none]")
    run.optimizers, run.scenarios = [OptimizerName.muon], [LayoutScenario.routed]
    run.fault = LayoutFault.norm_without_experts
    outcome = verify_layouts(run, folder=tmp_path)
    assert len(outcome.gaps) == 4
    norms = [gaps["grad_norm"] for gaps in outcome.gaps.values()]
    assert min(norms) > 1000 * STEP_BOUND
    assert max(norms) - min(norms) < STEP_BOUND
    with pytest.raises(BoundError) as caught:
        check_rows(rows_of(outcome))
    assert [reason.split(":")[0] for reason in str(caught.value).split("; ")] == ["grad_norm", "clip_factor"]


def test_a_reference_left_out_whole_and_a_step_that_did_not_clip_are_misses() -> None:
    trace = Trace(loss=[1.0, 1.0], grad_norm=[2.0, 0.1], clip_factor=[0.5, 1.0], bias=[], loads=[])
    noise = dict.fromkeys(("loss", "grad_norm", "clip_factor", "bias", "loads", "weights"), 0.0)
    references = {
        "muon.routed": Reference(trace=trace, noise=noise, moved=1.0, margin=1.0, coin_flip=0.1),
        "adamw.routed": Reference(trace=trace, noise=noise, moved=1.0, margin=0.0, coin_flip=0.1),
    }
    rows = {row.name: row for row in rows_of(Outcome(references=references, gaps={PLAIN: noise}, left_out=[]))}
    missed = {name: row.value for name, row in rows.items() if not row.is_kept}
    assert missed == {"references without a layout": 1, "steps that did not clip": 2}
    assert "adamw.routed" in rows["references without a layout"].note


def test_a_draw_of_tokens_with_a_coin_flip_is_left_out_counted_and_drawn_anew(tmp_path: Path) -> None:
    # With 64 experts ties are common; this seed's first draw has one.
    run: VerifyLayoutsRun = compose(
        "verify layouts",
        ["run.seed=30", "model.num_experts=64", "model.num_experts_per_token=4", "seq_len=32", "steps=2"],
    )
    run.world_sizes, run.experts, run.zeros, run.accumulations = [1], [1], [1], [1]
    run.optimizers, run.scenarios, run.recomputes = [OptimizerName.muon], [LayoutScenario.routed], [Recompute.none]
    outcome = verify_layouts(run, folder=tmp_path)
    (layout,) = outcome.gaps
    assert layout.draw >= 1
    assert outcome.left_out == [replace(layout, draw=draw) for draw in range(layout.draw)]
    check_rows(rows_of(outcome))


def test_groups_of_experts_keep_every_bound(tmp_path: Path) -> None:
    run = _run("world_sizes=[2]", "experts=[2]", "zeros=[1]", "accumulations=[1]", "recomputes=[none]")
    run.optimizers = [OptimizerName.adamw]
    run.model.num_groups, run.model.num_groups_per_token = 4, 2
    outcome = verify_layouts(run, folder=tmp_path)
    assert len(outcome.gaps) == 2
    check_rows(rows_of(outcome))


def test_a_loss_that_counts_first_and_clipped_heads_keep_every_bound(tmp_path: Path) -> None:
    weights = []
    for name, clip in (("clipped", 1e-3), ("free", None)):
        run = _run("world_sizes=[2]", "experts=[1]", "zeros=[2]", "accumulations=[2]", "recomputes=[none]")
        run.optimizers, run.scenarios = [OptimizerName.muon], [LayoutScenario.routed]
        run.model.balance.global_loss = 0.01
        run.optim.qk_clip = clip
        (tmp_path / name).mkdir()
        check_rows(rows_of(verify_layouts(run, folder=tmp_path / name)))
        state = load_file(tmp_path / name / "muon.routed.safetensors")
        weights.append(state["model.layers.0.self_attn.q_b_proj.weight"])
    assert weights[0].norm() < 0.9 * weights[1].norm()


def test_a_model_without_experts_keeps_every_bound(tmp_path: Path) -> None:
    run = _run("world_sizes=[2]", "experts=[1]", "zeros=[2]", "accumulations=[1]", "recomputes=[none]")
    run.optimizers, run.scenarios = [OptimizerName.adamw], [LayoutScenario.routed]
    run.model.num_dense_layers = run.model.num_layers
    check_rows(rows_of(verify_layouts(run, folder=tmp_path)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fault=dropped_token", "model.num_dense_layers=3"], "needs a model with experts"),
        (["zeros=[1,0]"], "parallel.zero is 0"),
        (["world_sizes=[1]", "experts=[2]"], "experts is "),
        (["experts=[3]"], "experts is "),
        (["experts=[0]"], "experts is "),
    ],
)
def test_what_no_layout_can_be_made_of_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _run(*words)


def test_nothing_compared_is_a_miss() -> None:
    empty = Trace(loss=[], grad_norm=[], clip_factor=[], bias=[], loads=[])
    noise = dict.fromkeys(("loss", "grad_norm", "clip_factor", "bias", "loads", "weights"), 0.0)
    reference = Reference(trace=empty, noise=noise, moved=1.0, margin=0.0, coin_flip=1.0)
    assert not reference.is_decided
    with pytest.raises(BoundError, match="loss"):
        check_rows(rows_of(Outcome(references={"muon.routed": reference}, gaps={}, left_out=[PLAIN])))


def test_all_valid_combinations_are_listed_and_half_the_rows_are_sometimes_empty() -> None:
    run: VerifyLayoutsRun = compose("verify layouts", [])
    assert len(layouts_of(run)) == 6 * 3 * 2 * 2 * 2 * 2
    assert int((make_batch(run, 1, draw=0).segments_BT[run.rows // 2 :] > 0).sum()) == 0
    with pytest.raises(ConfigError, match="rows is 6"):
        compose("verify layouts", ["rows=6"])
