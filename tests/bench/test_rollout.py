"""`bench rollout`: every contestant generates the turns of the same episodes, which are fixed before."""

import json
from pathlib import Path
from typing import Any

import pytest

from moetrain.bench.contestants import OURS, OURS_BF16
from moetrain.bench.engines.protocol import Turn, read_episodes
from moetrain.bench.episodes import episode_of
from moetrain.bench.generation_weights import write_weights
from moetrain.bench.generation_worker import call_of
from moetrain.bench.rollout import drawn_weights
from moetrain.cli.main import main
from moetrain.compose import compose
from moetrain.export.config import ExportFormat
from moetrain.files import write_json
from tests.peers import LLAMA_PYTHON, VLLM_PYTHON, needs_llama, needs_vllm

SMALL = [
    "model=k2_nano_test",
    "episodes=4",
    "group_size=2",
    "repetitions=2",
    "threads=1",
    "rollout.max_tokens=700",
    "rollout.max_turn_tokens=24",
    "task.database.max_calls=2",
    "conversation.turns=12",
    "conversation.given_tokens=4",
    "conversation.new_tokens=2",
    "conversation.prefix_tokens=300",
]
WIDE_HEADS = ["model.qk_nope_head_dim=24", "model.v_head_dim=32"]  # vLLM has no attention for heads of 16


def bench(tmp_path: Path, *words: str, stage: str = "bench") -> dict[str, Any]:
    assert main(["bench", "rollout", *SMALL, f"run.folder={tmp_path}", f"run.stage={stage}", *words]) == 0
    report: dict[str, Any] = json.loads((tmp_path / "default" / stage / "bench.json").read_text())
    return report


def test_random_weights_repeat_demonstrations_and_absent_peers_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in ("MOETRAIN_LLAMA_PYTHON", "MOETRAIN_VLLM_PYTHON"):
        monkeypatch.delenv(variable, raising=False)
    report = bench(tmp_path)
    assert [row["name"] for row in report["rows"]] == [OURS, OURS_BF16, "transformers bf16"]
    assert report["episodes"] == 4 and report["turns"] > 4
    for row in report["rows"]:
        assert row["failure"] is None and len(row["seconds"]) == 2
        assert row["rate"]["max"] == pytest.approx(4 / min(row["seconds"]))
    assert set(report["absent"]) == {"llama.cpp Q4_0", "vllm bf16, eager", "vllm bf16, torch.compile"}
    printed = " ".join(capsys.readouterr().out.split())
    assert "vllm bf16, eager is not installed: run launch/peers.sh vllm and give vllm_python=" in printed
    rows = report["conversation"]["turns"]
    assert [(row["turn"], row["tokens"]) for row in rows] == [(10, 54), (12, 66)]
    assert rows[0]["ratio"] == 1 and rows[1]["ratio"] > 0
    prefix = report["conversation"]["prefix"]
    assert prefix["repeated_s"] > 0 and 128 <= prefix["cached"] < 300
    assert "first token after a prompt of 300 tokens" in printed
    episodes = read_episodes(tmp_path / "default/bench/episodes.json")
    assert report["new_tokens"] == sum(turn.num_new for episode in episodes for turn in episode)


def test_a_model_repeats_its_own_episodes(tmp_path: Path) -> None:
    drawn = drawn_weights(compose("bench rollout", SMALL))
    (export,) = write_weights(
        drawn.reader,
        folder=tmp_path,
        formats=[ExportFormat.quantized],
        model=drawn.model,
        quant=drawn.quant,
        tokenizer=drawn.tokenizer,
        sources={},
    ).values()
    report = bench(tmp_path, "peers=[]", "repetitions=1", "conversation.turns=0", "run.seed=1", f"init_from={export}")
    assert report["conversation"] is None
    # With this seed no turn ends by itself, so each episode is one turn of the longest length.
    assert (report["turns"], report["new_tokens"]) == (4, 4 * 24)


def test_an_episode_is_cut_where_given_tokens_begin_again() -> None:
    episode = episode_of([1, 2, 3, 4, 5, 6, 7], [False, False, True, True, False, True, False])
    assert episode == [Turn(given=[1, 2], num_new=2), Turn(given=[5], num_new=1)]


class ShortEngine:
    """An engine that generates one token less than it should."""

    def replay(self, episodes: Any) -> int:
        return sum(turn.num_new for episode in episodes for turn in episode) - 1


def test_a_contestant_that_generates_fewer_tokens_fails(tmp_path: Path) -> None:
    write_json(tmp_path / "episodes.json", {"episodes": [[[[1, 2], 3]]]})
    call = call_of(ShortEngine(), {"do": "replay", "episodes": str(tmp_path / "episodes.json")})  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="it generated 2 tokens instead of 3"):
        call()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("rollout.max_tokens=30", "the first turn of task 1000000 ends after that"),
        ("episodes=0", "episodes is 0"),
        ("quant.enabled=false", "quant.enabled is false"),
        ("vllm_python=/no/such/python", "vllm_python is /no/such/python: it does not run"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    tmp_path: Path, word: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "rollout", *SMALL, f"run.folder={tmp_path}", "rollout.max_turn_tokens=10", word]) == 2
    assert message in capsys.readouterr().err


@needs_llama
def test_llama_cpp_repeats_the_episodes(tmp_path: Path) -> None:
    report = bench(tmp_path, "peers=[llama]", f"llama_python={LLAMA_PYTHON}")
    assert report["rows"][-1]["failure"] is None


@needs_vllm
def test_vllm_repeats_the_episodes(tmp_path: Path) -> None:
    report = bench(tmp_path, "peers=[vllm]", f"vllm_python={VLLM_PYTHON}", *WIDE_HEADS)
    assert report["rows"][-1]["failure"] is None
