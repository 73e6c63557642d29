"""Continuing a run in a new stage: the steps, rows and optimizer state of one long run, or a stated new schedule."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moetrain.checkpoint import read as checkpoint
from moetrain.checkpoint.origin import Origin, read_origin
from moetrain.checkpoint.read import CHECKPOINTS
from moetrain.compose import compose
from moetrain.data.config import MixConfig, SourceConfig, SourceKind
from moetrain.data.loader import Loader, Mix
from moetrain.errors import CheckpointError, ConfigError
from moetrain.log import read_metrics
from moetrain.optim.config import OptimConfig, OptimizerName, ScheduleConfig, ScheduleName
from moetrain.parallel.config import EngineName
from moetrain.stage_files import SUMMARY
from moetrain.train.config import Continuation
from moetrain.train.continuation import StartPoint, sources_problem
from moetrain.train.interrupt import Status
from moetrain.train.stages import Sections
from tests.data.test_loader import rows_of
from tests.train.test_stages import run, sections, write_texts
from tests.train.toy import losses

CONSTANT = ScheduleConfig(name=ScheduleName.constant, warmup_steps=2)
UNTIL_THE_END = ScheduleConfig(warmup_steps=2, decay_fraction=0.0)


def settings(
    folder: Path, *, steps: int, schedule: ScheduleConfig = CONSTANT, continue_as: Continuation | None = None
) -> Sections:
    made = sections(folder / "texts")
    train = replace(made.train, steps=steps, checkpoint_every=9, continue_as=continue_as)
    return replace(made, train=train, optim=replace(made.optim, schedule=schedule))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run of 6 steps, `whole`, and one of 3, `first`, at a constant rate."""
    folder = tmp_path_factory.mktemp("runs")
    write_texts(folder / "texts")
    run(folder / "whole", settings(folder, steps=6))
    run(folder / "first", settings(folder, steps=3))
    return folder


def first(runs: Path) -> Origin:
    return read_origin(runs / "first")


def same_tensors(one: Path, other: Path) -> bool:
    tensors = [dict(checkpoint.load(folder / CHECKPOINTS / "step_00000006").tensors) for folder in (one, other)]
    assert any(name.startswith(checkpoint.OPTIMIZER_PREFIX) for name in tensors[0])
    assert tensors[0].keys() == tensors[1].keys()
    return all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())


@pytest.mark.parametrize(("continue_as", "steps"), [(Continuation.part, 3), (Continuation.whole, 6)])
def test_a_continued_run_is_one_long_run_bit_for_bit_at_a_constant_rate(
    runs: Path, continue_as: Continuation, steps: int
) -> None:
    folder, told = runs / f"second_{continue_as}", read_metrics(runs / "whole" / "metrics.jsonl")
    before = (runs / "first" / "metrics.jsonl").read_bytes()
    config = settings(runs, steps=steps, continue_as=continue_as)
    assert run(folder, config, origin=first(runs)) is Status.finished
    assert losses(runs / "first" / "metrics.jsonl") + losses(folder / "metrics.jsonl") == losses(
        runs / "whole" / "metrics.jsonl"
    )
    assert same_tensors(folder, runs / "whole")
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [4, 5, 6]
    assert [row["total/tokens"] for row in rows] == [row["total/tokens"] for row in told if "loss" in row][3:]
    summary, whole = (json.loads((path / SUMMARY).read_text()) for path in (folder, runs / "whole"))
    continued = summary.pop("continued")
    assert (continued["steps"], continued["as"]) == (3, continue_as)
    assert continued["tokens"] == json.loads((runs / "first" / SUMMARY).read_text())["tokens"]
    assert {**summary, "time": {}, "stage": "", "mixes": []} == {**whole, "time": {}, "stage": "", "mixes": []}
    assert checkpoint.steps(runs / "first" / CHECKPOINTS) == [3]
    assert (runs / "first" / "metrics.jsonl").read_bytes() == before


def test_whole_stretches_the_schedule_and_another_engine_resumes_the_continuation(runs: Path) -> None:
    """The decay of the long run begins at the step where the short one stopped; the continuation is itself stopped."""
    decaying = replace(UNTIL_THE_END, decay_fraction=0.5)
    run(runs / "flat", settings(runs, steps=3, schedule=UNTIL_THE_END))
    run(runs / "long", settings(runs, steps=6, schedule=decaying))
    config = settings(runs, steps=6, schedule=decaying, continue_as=Continuation.whole)
    config = replace(config, train=replace(config.train, checkpoint_every=1, keep_checkpoints=9))
    run(runs / "decay", config, origin=read_origin(runs / "flat"))
    assert losses(runs / "decay" / "metrics.jsonl") == losses(runs / "long" / "metrics.jsonl")[3:]
    assert same_tensors(runs / "decay", runs / "long")

    whole = losses(runs / "decay" / "metrics.jsonl")
    for step in (5, 6):
        (runs / "decay" / CHECKPOINTS / f"step_{step:08d}").rename(runs / f"moved_{step}")
    other = replace(config, parallel=replace(config.parallel, engine=EngineName.deepspeed))
    run(runs / "decay", other, origin=read_origin(runs / "flat"))
    torch.testing.assert_close(losses(runs / "decay" / "metrics.jsonl"), whole, rtol=1e-4, atol=1e-5)


def test_the_schedule_of_a_part_starts_at_the_last_rate_and_runs_over_the_added_steps() -> None:
    optim = OptimConfig(lr=1e-2, schedule=ScheduleConfig(warmup_steps=4, decay_fraction=0.5, final_ratio=0.1))
    part = StartPoint(step=100, first_step=100, last_rate=2e-3)
    rates = [part.rate(step, optim=optim, steps=10) for step in range(100, 110)]
    assert rates[:5] == pytest.approx([4e-3, 6e-3, 8e-3, 1e-2, 1e-2])
    assert rates[-1] == pytest.approx(1e-3)
    lower = replace(optim, lr=1e-3)
    assert part.rate(100, optim=lower, steps=10) == 1e-3  # needs no warmup
    whole = StartPoint(step=100, last_rate=2e-3)
    assert whole.rate(100, optim=optim, steps=200) == StartPoint().rate(100, optim=optim, steps=200)


def test_no_row_is_read_twice_before_its_epoch_under_another_mix() -> None:
    rows = {name: rows_of(16, number=16, first=20 * index) for index, name in enumerate("abc")}
    before = Loader(rows, mixes=[Mix(first_row=0, weights={"a": 3.0, "b": 1.0, "c": 0.0})], seed=3, pad_id=0)
    taken = before.rows_taken(10)
    weights = [{"c": 1.0, "a": 1.0, "b": 0.0}, {"c": 0.0, "a": 0.0, "b": 1.0}]
    mixes = [Mix(first_row=10, weights=weights[0]), Mix(first_row=16, weights=weights[1])]
    after = Loader(dict(reversed(rows.items())), mixes=mixes, seed=3, pad_id=0, taken=taken)
    places = [before.place(index) for index in range(10)] + [after.place(index) for index in range(10, 20)]
    assert {place.epoch for place in places} == {0}
    assert len({(place.source, place.row) for place in places}) == 20
    assert sum(after.rows_taken(20).values()) == 20
    assert after.rows_taken(10) == taken | {"c": 0}


def test_another_mix_with_a_new_source_counts_the_rows_of_both_parts(runs: Path) -> None:
    write_texts(runs / "numbers", words=[str(7**n) for n in range(8)])
    config = settings(runs, steps=4, continue_as=Continuation.part)
    sources = {
        "numbers": SourceConfig(kind=SourceKind.text, path=str(runs / "numbers")),
        "words": replace(config.data.sources["words"], weight=0.0),
    }
    config = replace(
        config, data=replace(config.data, sources=sources, mix=[MixConfig(from_step=2, weights={"words": 1})])
    )
    run(runs / "mixed", config, origin=first(runs))
    summary = json.loads((runs / "mixed" / SUMMARY).read_text())
    assert summary["rows"] == 28 and summary["steps"] == 7
    assert [sum(mix.values()) for mix in summary["mixes"]] == [8, 8]
    data = checkpoint.load(runs / "mixed" / CHECKPOINTS / "step_00000007").state["data"]
    taken = {name: counts["rows_taken"] for name, counts in data["sources"].items()}
    assert taken == {"numbers": 12, "words": 16}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: replace(s, seed=6), r"run.seed is 6, but the run of .* has 5: set run.seed=5"),
        (
            lambda s: replace(s, optim=replace(s.optim, name=OptimizerName.adamw)),
            r"optim.name is adamw, but .* has muon",
        ),
        (lambda s: replace(s, data=replace(s.data, seq_len=32)), r"data.seq_len: 64 -> 32"),
        (lambda s: replace(s, train=replace(s.train, rows_per_step=8)), r"rows_read: 12 -> 24.*continue_as=part"),
        (lambda s: replace(s, train=replace(s.train, steps=3)), r"train.steps is 3, but .* has taken 3 steps"),
        (lambda s: replace(s, model=replace(s.model, rope_theta=1e4)), r"rope_theta"),
    ],
)
def test_what_a_run_cannot_be_continued_with_is_named(
    runs: Path, tmp_path: Path, change: Callable[[Sections], Sections], said: str
) -> None:
    config = change(settings(runs, steps=6, continue_as=Continuation.whole))
    with pytest.raises(CheckpointError, match=said) as raised:
        run(tmp_path / "second", config, origin=first(runs))
    assert raised.value.exit_code == 2
    assert not (tmp_path / "second" / CHECKPOINTS).exists()


def test_other_documents_under_the_same_settings_are_refused(runs: Path, tmp_path: Path) -> None:
    write_texts(tmp_path / "texts")
    path = tmp_path / "texts" / "00.txt"
    path.write_text(path.read_text().swapcase())
    with pytest.raises(CheckpointError, match=r"sources\.words\.sha256: "):
        run(tmp_path / "second", settings(tmp_path, steps=3, continue_as=Continuation.part), origin=first(runs))


def test_weights_without_a_run_cannot_be_continued(runs: Path, tmp_path: Path) -> None:
    config = settings(runs, steps=3, continue_as=Continuation.part)
    with pytest.raises(CheckpointError, match="has weights but no training state"):
        run(tmp_path / "second", config, origin=replace(first(runs), checkpoint=None))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["continue_from=x"], "train.continue_as is null: give part or whole"),
        (["train.continue_as=part"], "train.continue_as is part and continue_from is null"),
        (["continue_from=x", "init_from=y", "train.continue_as=part"], "init_from is y and continue_from is x"),
        (
            ["continue_from=x", "train.continue_as=part", "optim.schedule.initial_ratio=0.5"],
            "initial_ratio is 0.5: with train.continue_as=part",
        ),
    ],
)
@pytest.mark.parametrize("command", ["pretrain", "rl"])
def test_what_does_not_go_together_is_refused(command: str, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        compose(command, ["model=k2_nano_test", *(["data=test"] if command == "pretrain" else []), *words])
    assert "\n" not in str(raised.value)


def test_a_size_of_the_tokenizer_that_is_not_given_is_that_of_the_run() -> None:
    read = {"sources": {}, "seq_len": 64, "tokenizer": {"vocab_size": 384, "max_characters": 9}}
    assert sources_problem(read, read | {"tokenizer": {"vocab_size": None, "max_characters": 9}}, path="x") is None
    other = sources_problem(read, read | {"tokenizer": {"vocab_size": 512, "max_characters": 9}}, path="x")
    assert other is not None and "(data.tokenizer.vocab_size: 384 -> 512)" in other
