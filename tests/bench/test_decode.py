"""`bench decode`: contestants generate from the same weights in turn, and the byte floor is that of the formula."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moetrain.bench.contestants import OURS, OURS_BF16, entries
from moetrain.bench.decode import bytes_per_step
from moetrain.bench.engines.protocol import EngineSettings
from moetrain.bench.gpu import check_peers
from moetrain.cli.main import main
from moetrain.commands.bench_generation import DecodeCase, GenerationPeer
from moetrain.compose import compose
from moetrain.errors import ConfigError
from moetrain.model.config import ModelConfig, ScoreFunction
from moetrain.model.flops import expert_parameters, num_parameters
from moetrain.quant.config import QuantConfig

WORDS = ["model=k2_nano_test", "model.vocab_size=300", "cases=[{batch:2,context:8}]", "steps=3", "repetitions=2"]


def test_contestants_generate_in_turn(tmp_path: Path) -> None:
    assert main(["bench", "decode", *WORDS, "threads=1", f"run.folder={tmp_path}"]) == 0
    report = json.loads((tmp_path / "default/bench_decode/bench.json").read_text())
    (case,) = report["cases"]
    names = [row["name"] for row in case["rows"]]
    assert names == [OURS, OURS_BF16, "transformers bf16"]
    assert [row["setting"] for row in case["rows"][:2]] == ["native, INT4 experts", "native, bf16 experts"]
    for row in case["rows"]:
        assert row["failure"] is None and len(row["seconds"]) == 2
        assert row["tokens_per_s"]["max"] == pytest.approx(2 * 3 / min(row["seconds"]))
    assert case["rows"][0]["ours_over_it"]["median"] == 1.0


def test_a_peer_that_computes_another_model_does_not_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOETRAIN_VLLM_PYTHON", raising=False)
    found = {
        score: entries(
            [GenerationPeer.transformers],
            model=replace(ModelConfig(), score_function=score),
            quant=QuantConfig(enabled=True),
            settings=EngineSettings(threads=1, mode="", max_sequences=1, max_tokens=8),
            num_cached=8,
            llama_python=None,
            vllm_python=None,
        )
        for score in (ScoreFunction.sigmoid, ScoreFunction.sqrt_softplus)
    }
    assert not any(entry.absent for entry in found[ScoreFunction.sigmoid])
    *ours, peer = found[ScoreFunction.sqrt_softplus]
    assert not any(entry.absent for entry in ours)
    assert "model.score_function=sqrt_softplus: it computes sigmoid" in peer.absent


def test_one_token_reads_its_own_experts_and_a_large_batch_all() -> None:
    model = ModelConfig()
    alone, many = DecodeCase(batch=1, context=1), DecodeCase(batch=10_000, context=1)
    counts, layers = num_parameters(model), model.num_moe_layers
    cache = 2 * model.num_layers * (model.kv_lora_rank + model.qk_rope_head_dim)
    assert bytes_per_step(model, alone, expert_bytes=2) == pytest.approx(2 * counts.active_with_head + cache)
    rest = counts.active_with_head - layers * model.num_experts_per_token * expert_parameters(model)
    assert bytes_per_step(model, many, expert_bytes=0.5) == pytest.approx(
        2 * rest + 0.5 * counts.routed + 10_000 * cache
    )


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("cases=[]", "cases is empty"),
        ("cases=[{batch:0,context:8}]", "batch is 0"),
        ("cases=[{batch:1,context:5000}]", "the longest sequence of cases is 50"),
        ("steps=0", "steps is 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(word: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "decode", *WORDS, word]) == 2
    assert message in capsys.readouterr().err


def test_two_thirds_of_the_weights_of_a_token_are_routed() -> None:
    model = compose("bench decode", []).model
    counts = num_parameters(model)
    routed = model.num_moe_layers * model.num_experts_per_token * expert_parameters(model)
    assert counts.total > 600e6 and routed / counts.active_with_head > 2 / 3


def test_peers_of_another_device_are_refused() -> None:
    check_peers(torch.device("cpu"), ["transformers"])
    check_peers(torch.device("cuda", 0), [])
    with pytest.raises(ConfigError, match=r"peers is \[transformers\]: they compute on the CPU.*give peers=\[\]"):
        check_peers(torch.device("cuda", 0), ["transformers"])
