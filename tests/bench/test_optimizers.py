"""The comparison of optimizers: equal tokens and weights for all, the best rate of each, logits with the clip."""

import json
import math
from pathlib import Path

import pytest

from moetrain.bench.optimizers import Comparison, OptimizerResult, bench_optimizers, picture, render, write_results
from moetrain.commands.bench import BenchOptimizersRun
from moetrain.data.build import build_data
from moetrain.data.config import DataConfig, SourceConfig, SourceKind
from moetrain.errors import ConfigError
from moetrain.model.config import ModelConfig
from moetrain.optim.config import OptimConfig, OptimizerName, ScheduleConfig
from tests.bench.text_run import TEXT, VOCAB_SIZE, text_sections

STEPS, THRESHOLD = 16, 3.0
MODEL = ModelConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    q_lora_rank=None,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_experts=4,
)
RATES = {OptimizerName.muon: [0.01, 0.02], OptimizerName.adamw: [0.01, 1e30]}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("bench") / "tokenizer"
    sections = text_sections(
        folder, model=MODEL, optim=OptimConfig(schedule=ScheduleConfig(warmup_steps=2)), steps=STEPS, rows=4
    )
    notes: list[str] = []
    found = bench_optimizers(
        sections,
        RATES,
        clip_rate=0.4,
        threshold=THRESHOLD,
        data=build_data(sections.data, 0, tokenizer_folder=folder),
        on_step=notes.append,
    )
    assert len(notes) == 5 * STEPS + 1  # the absurd rate diverges in its second step
    return found


def test_every_run_starts_from_the_same_weights_and_tokens(comparison: Comparison) -> None:
    runs = [*comparison.sweep, comparison.unclipped, comparison.clipped]
    assert [run.name for run in runs] == [
        "muon 0.01",
        "muon 0.02",
        "adamw 0.01",
        "adamw 1e+30",
        "muon 0.4",
        "muon 0.4, clip 3",
    ]
    assert len({run.cross_entropy[0] for run in runs}) == 1
    assert len({run.max_logit[0] for run in runs}) == 1
    assert [len(run.cross_entropy) for run in runs] == [STEPS, STEPS, STEPS, 1, STEPS, STEPS]
    assert all(len(run.cross_entropy) == len(run.max_logit) for run in runs)


def test_a_rate_that_diverges_is_told_and_is_not_the_best(comparison: Comparison) -> None:
    assert math.isnan(comparison.sweep[3].held_out)
    assert comparison.best(OptimizerName.adamw).name == "adamw 0.01"


def test_the_clip_holds_the_logits_that_grow_without_it(comparison: Comparison) -> None:
    unclipped, clipped = comparison.unclipped, comparison.clipped
    first = next(step for step, largest in enumerate(clipped.max_logit) if largest > THRESHOLD)
    assert clipped.max_logit[: first + 1] == unclipped.max_logit[: first + 1]
    assert sum(clipped.heads_clipped) > 0
    assert sum(unclipped.heads_clipped) == 0
    assert max(clipped.max_logit) < 0.5 * max(unclipped.max_logit)


def _run(name: OptimizerName, rate: float, *, held_out: float, losses: list[float]) -> OptimizerResult:
    optim = OptimConfig(name=name, lr=rate)
    return OptimizerResult(name=f"{name} {rate}", optim=optim, cross_entropy=losses, validation={"a": held_out})


def test_each_optimizer_stands_for_itself_with_its_best_rate() -> None:
    adamw = [
        _run(OptimizerName.adamw, 0.1, held_out=math.nan, losses=[0.0] * 20),
        _run(OptimizerName.adamw, 0.2, held_out=2.0, losses=[4.0] * 20),
        _run(OptimizerName.adamw, 0.3, held_out=3.0, losses=[9.0] * 20),
    ]
    muon = [
        _run(OptimizerName.muon, 0.1, held_out=1.5, losses=[5.0] * 8 + [0.0] * 12),
        _run(OptimizerName.muon, 0.2, held_out=1.6, losses=[0.0] * 20),
    ]
    made = Comparison(sweep=[*muon, *adamw], unclipped=muon[0], clipped=muon[0])
    assert made.best(OptimizerName.adamw) is adamw[1]
    assert made.best(OptimizerName.muon) is muon[0]
    # A mean of eight losses is at 4 when two of them are 0: after ten steps of twenty.
    assert made.share_of_tokens() == pytest.approx(10 / 20)
    never = Comparison(sweep=[adamw[2], _run(OptimizerName.muon, 1.0, held_out=1.0, losses=[9.1] * 20)], **_two(muon))
    assert never.share_of_tokens() == math.inf


def _two(runs: list[OptimizerResult]) -> dict[str, OptimizerResult]:
    return {"unclipped": runs[0], "clipped": runs[1]}


def test_table_json_and_picture_hold_every_run(comparison: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "optimizers.json"
    write_results(path, comparison, context={"steps": STEPS})
    content = json.loads(path.read_text())
    assert content["steps"] == STEPS
    assert [len(run["max_logit"]) for run in content["runs"]] == [STEPS, STEPS, STEPS, 1, STEPS, STEPS]
    assert [run["optim"]["qk_clip"] for run in content["runs"]] == [None] * 5 + [THRESHOLD]
    assert content["runs"][3]["held_out"] is None
    table = render(comparison)
    assert table.row_count == 6
    assert list(table.columns[-1].cells).count("best") == 2
    page = picture(comparison)
    assert page.count('<svg class="chart"') == 3
    assert "muon 0.4, clip 3" in page


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"muon_rates": []}, "muon_rates is empty"),
        ({"adamw_rates": [0.1, 0.0]}, r"adamw_rates is \[0.1, 0.0\]"),
        ({"clip_threshold": 0.0}, r"clip_threshold is 0.0"),
    ],
)
def test_sweeps_without_rates_and_thresholds_that_clip_all_are_refused(values: dict[str, object], said: str) -> None:
    data = DataConfig(sources={"text": SourceConfig(kind=SourceKind.jsonl, path=str(TEXT))})
    with pytest.raises(ConfigError, match=said):
        BenchOptimizersRun(data=data, model=ModelConfig(), **values)  # type: ignore[arg-type]
