"""Contestants of `bench train` train the same thing, are timed in turn, and one that fails is reported."""

import json
from pathlib import Path

import pytest
import torch

from moetrain.bench.contestant import Contestant, Kind, Remote
from moetrain.bench.train import contestants, render
from moetrain.bench.worker import build, make_batch
from moetrain.commands.bench import BenchTrainRun, Peer
from moetrain.compose import compose
from moetrain.errors import ConfigError
from tests.cli.command import moetrain

WORDS = ["model=k2_nano_test", "rows=2", "seq_len=32", "steps=1", "repetitions=2", "warmup_steps=2", "threads=1"]


def test_everyone_starts_from_the_same_weights_and_takes_the_same_steps() -> None:
    run: BenchTrainRun = compose("bench train", [*WORDS, "optim.lr=1e-2"])
    losses = {}
    for kind in Kind:
        trainee = build(run, Contestant(kind=kind, ranks=1, threads=1, expert=1))
        losses[kind] = torch.tensor([trainee.step(make_batch(run, 0)) for _ in range(4)])
    ours = losses[Kind.moetrain]
    assert ours[-1] < ours[0] - 0.2
    for found in losses.values():
        torch.testing.assert_close(found, ours, rtol=0, atol=2e-2)  # bf16, and the order of sums


def test_the_command_measures_every_turn_and_says_where_the_time_goes(tmp_path: Path) -> None:
    done = moetrain("bench", "train", *WORDS, "peers=[]", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "runs/default/bench_train/bench.json").read_text())
    deepspeed, plain = report["rows"]
    assert (deepspeed["name"], plain["name"]) == ("moetrain", "moetrain_torch")
    assert [len(turn) for turn in plain["seconds_of_steps"]] == [1, 1]
    assert plain["ours_over_it"]["min"] <= plain["ours_over_it"]["median"] <= plain["ours_over_it"]["max"]
    assert plain["losses"] == pytest.approx(deepspeed["losses"], rel=1e-6)
    tokens, seconds = report["tokens_per_step"], [sum(turn) for turn in plain["seconds_of_steps"]]
    assert plain["tokens_per_s"]["max"] == pytest.approx(tokens / min(seconds))
    parts = report["profile"]
    assert {"attention", "experts", "router and dispatch", "head and loss", "optimizer"} <= parts.keys()
    assert all(value > 0 for value in parts.values())
    assert "time of moetrain by part of the model" in done.stdout


def test_a_contestant_that_ends_early_is_reported_with_its_last_words(tmp_path: Path) -> None:
    contestant = Contestant(kind=Kind.deepspeed_autoep, ranks=1, threads=1, expert=1)
    remote = Remote(contestant, config=tmp_path / "missing.yaml", log=tmp_path / "log")
    try:
        assert remote.ask("prepare") is None
        assert remote.ask("turn") is None
    finally:
        remote.close()
    assert remote.failure is not None
    assert "missing.yaml" in remote.failure
    row = {**contestant.as_dict(), "name": contestant.name, "failure": remote.failure}
    report = {"rows": [row], "parameters": 1, "tokens_per_step": 1, "flops_per_token": 1.0, "peak_flops": 1.0}
    (table,) = render({**report, "profile": None})
    assert "missing.yaml" in str(list(table.columns[2].cells))


def test_ranks_share_the_threads_and_the_experts() -> None:
    run: BenchTrainRun = compose("bench train", [*WORDS, "ranks=2", "threads=4", "peers=[deepspeed_autoep]"])
    found = {c.name: (c.ranks, c.threads, c.expert) for c in contestants(run, threads=4)}
    assert found == {
        "moetrain": (1, 4, 1),
        "moetrain_torch": (1, 4, 1),
        "deepspeed_autoep": (1, 4, 1),
        "moetrain ep 2": (2, 2, 2),
        "moetrain dp 2": (2, 2, 1),
        "deepspeed_autoep ep 2": (2, 2, 2),
    }
    assert list(run.peers) == [Peer.deepspeed_autoep]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rows=3", "ranks=2", "threads=2"], r"ranks is 2: it must divide rows=3"),
        (["ranks=2"], r"threads is 1: give at least one per rank, 2"),
        (["optim.name=muon"], r"optim.name is muon: peers support only adamw"),
        (["seq_len=100000"], r"seq_len is 100000"),
        (["steps=0"], r"steps is 0: give at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose("bench train", [*WORDS, *words])
