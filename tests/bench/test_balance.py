"""The comparison of balance methods: equal tokens and weights for all, all of it in the JSON, bad input at the door."""

import json
from pathlib import Path

import pytest

from moetrain.bench.balance import MethodResult, bench_balance, render, write_results
from moetrain.commands.bench import BenchBalanceRun
from moetrain.data.build import build_data
from moetrain.data.config import DataConfig, SourceConfig, SourceKind
from moetrain.errors import ConfigError
from moetrain.model.config import BalanceConfig, BiasRule, ModelConfig
from moetrain.optim.config import OptimConfig
from tests.bench.text_run import TEXT, VOCAB_SIZE, text_sections

OFF = BalanceConfig(bias_rule=BiasRule.none, sequence_loss=0.0)
METHODS = {
    "none": OFF,
    "none again": OFF,
    "quantile": BalanceConfig(bias_rule=BiasRule.quantile, sequence_loss=0.0),
    "global": BalanceConfig(bias_rule=BiasRule.none, sequence_loss=0.0, global_loss=0.05),
}
STEPS = 12
MODEL = ModelConfig(
    vocab_size=VOCAB_SIZE, hidden_size=32, num_layers=2, intermediate_size=48, moe_intermediate_size=16, num_experts=16
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MethodResult]:
    folder = tmp_path_factory.mktemp("bench") / "tokenizer"
    sections = text_sections(folder, model=MODEL, optim=OptimConfig(lr=1e-2), steps=STEPS, rows=8)
    data = build_data(sections.data, 0, tokenizer_folder=folder)
    notes: list[str] = []
    found = bench_balance(sections, METHODS, data=data, tail_share=0.25, on_step=notes.append)
    assert len(notes) == STEPS
    return {result.name: result for result in found}


def test_the_same_method_twice_has_the_same_figures_to_the_last_digit(results: dict[str, MethodResult]) -> None:
    assert results["none"].figures == results["none again"].figures
    assert results["none"].maxvio == results["none again"].maxvio
    assert results["none"].maxvio[0] == results["quantile"].maxvio[0] == results["global"].maxvio[0]


def test_balancing_lowers_the_violation_in_training_and_on_held_out_rows(results: dict[str, MethodResult]) -> None:
    for method in ("quantile", "global"):
        for name in ("maxvio", "maxvio_held_out", "load_variation"):
            assert results[method].figures[name] < results["none"].figures[name], (method, name)


def test_the_figures_are_means_over_the_last_quarter_of_the_steps(results: dict[str, MethodResult]) -> None:
    for result in results.values():
        assert result.figures["maxvio"] == pytest.approx(sum(result.maxvio[-3:]) / 3)
        assert len(result.seconds) == STEPS


def test_table_and_json_hold_every_method(results: dict[str, MethodResult], tmp_path: Path) -> None:
    assert render(list(results.values())).row_count == len(METHODS)
    write_results(tmp_path / "balance.json", list(results.values()), context={"steps": STEPS})
    content = json.loads((tmp_path / "balance.json").read_text())
    assert content["steps"] == STEPS
    assert [row["name"] for row in content["methods"]] == list(METHODS)
    assert content["methods"][2]["balance"]["bias_rule"] == "quantile"
    assert content["methods"][2]["figures"]["validation/text"] > 0


def test_a_bench_without_methods_or_steps_to_average_is_refused() -> None:
    data = DataConfig(sources={"text": SourceConfig(kind=SourceKind.jsonl, path=str(TEXT))})
    with pytest.raises(ConfigError, match="methods is empty"):
        BenchBalanceRun(data=data)
    with pytest.raises(ConfigError, match="tail_share is 0"):
        BenchBalanceRun(data=data, methods=METHODS, tail_share=0.0)
