"""Groups that are begun early: each is used once, none is too old, and a run that was stopped loses none."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moetrain.errors import ConfigError
from moetrain.inference.protocol import Model
from moetrain.parallel.config import EngineName
from moetrain.quant.config import QuantConfig
from moetrain.rl.collection import USED, Collection
from moetrain.rl.stage import collection_of
from moetrain.rollout.sync import sync_weights
from moetrain.rollout.types import Trajectory
from tests.report.nano_run import trajectory
from tests.rl.test_stage import _TRAIN, MODEL, _engine, _stage

STEPS = 6


@pytest.fixture(scope="module")
def model() -> Model:
    return sync_weights(_engine(EngineName.torch), config=MODEL, quant=QuantConfig(enabled=True), dtype=torch.float32)


def _collection(folder: Path | None, *, staleness: int) -> Collection:
    stage = _stage(_engine(EngineName.torch), [])
    stage = replace(stage, collection=folder, rl=replace(stage.rl, max_staleness=staleness))
    stage = replace(stage, rollout=replace(stage.rollout, num_slots=7))  # fewer than one group's trajectories
    return collection_of(stage, replace(_TRAIN, steps=STEPS))


def _keys(groups: list[list[Trajectory]]) -> list[tuple[int, int]]:
    return [(trajectory.task, trajectory.sample) for group in groups for trajectory in group]


@pytest.mark.parametrize("staleness", [0, 1, 3, 20])
def test_every_trajectory_is_used_once_and_none_is_older_than_allowed(staleness: int, model: Model) -> None:
    collection, seen, ages = _collection(None, staleness=staleness), [], []
    for step in range(STEPS):
        groups, metrics = collection.groups(model, step=step)
        assert len(groups) == 4 and all(len(group) == 8 for group in groups)
        seen += _keys(groups)
        ages.append(metrics.get("staleness_max", 0.0))
    collection.close()
    assert sorted(seen) == [(task, sample) for task in range(4 * STEPS) for sample in range(8)]
    assert max(ages) <= staleness and (max(ages) > 0) == (staleness > 0)


def test_without_staleness_the_tasks_are_used_in_order(model: Model) -> None:
    collection = _collection(None, staleness=0)
    for step in range(2):
        groups, _ = collection.groups(model, step=step)
        assert [group[0].task for group in groups] == list(range(4 * step, 4 * step + 4))


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_collection_that_was_stopped_repeats_no_finished_trajectory(
    staleness: int, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected: list[tuple[int, int]] = []
    keep = Collection._keep

    def counted(self: Collection, request: object, trajectory: Trajectory) -> None:
        collected.append((trajectory.task, trajectory.sample))
        keep(self, request, trajectory)  # type: ignore[arg-type]
        if len(collected) in (1, 20, 60, 61, 100, 150):
            raise KeyboardInterrupt

    monkeypatch.setattr(Collection, "_keep", counted)
    used: dict[int, list[tuple[int, int]]] = {}
    step = 0
    while step < STEPS:
        collection = _collection(tmp_path, staleness=staleness)
        step = max(step - 1, 0)  # from the last checkpoint
        try:
            while step < STEPS:
                groups, _ = collection.groups(model, step=step)
                used[step] = _keys(groups)
                step += 1
        except KeyboardInterrupt:
            pass
    assert sorted(collected) == [(task, sample) for task in range(4 * STEPS) for sample in range(8)]
    assert sorted(key for keys in used.values() for key in keys) == sorted(collected)


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_tasks_that_a_damaged_file_does_not_name_count_as_used_in_order(
    damage: str, model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    collection = _collection(tmp_path, staleness=1)
    for step in range(3):
        collection.groups(model, step=step)
    collection.close()
    path = tmp_path / USED
    content = path.read_bytes()
    path.write_bytes(content[:-30] if damage == "cut" else content.replace(b"[0,", b"[9,"))
    assert path.read_bytes() != content
    again = _collection(tmp_path, staleness=1)
    groups, _ = again.groups(model, step=3)
    again.close()
    assert "does not name the tasks of all steps" in caplog.text and len(groups) == 4


@pytest.mark.parametrize("staleness", [1, 2, 3, 5])
@pytest.mark.parametrize("order", ["last first", "random"])
def test_no_group_is_used_too_late_in_whatever_order_groups_become_complete(staleness: int, order: str) -> None:
    collection, stream = _collection(None, staleness=staleness), random.Random(staleness)
    setting = collection._setting
    for step in range(STEPS):
        collection._new_requests(step)
        waiting = [task for task in collection._begun if not collection._groups[task].finished]
        waiting = sorted(task for task in waiting if task not in (collection._used or ()))
        if order == "random":
            stream.shuffle(waiting)
        while (chosen := collection._choose(step)) is None:
            task = waiting.pop()
            for sample in range(8):
                collection._add(replace(trajectory(task, success=True), sample=sample))
        assert len(chosen) == 4 and all(setting.begun_at(task) <= step <= setting.last_use(task) for task in chosen)
        for task in chosen:
            collection._groups.pop(task)
        collection._mark_used(chosen, step=step)
    assert collection._used == set(range(4 * STEPS))


def test_groups_in_progress_that_other_ranks_cannot_use_in_time_are_refused_on_every_rank() -> None:
    """Tasks go to ranks by their number. One rank used the even tasks first, so rank 1 of 2 holds too many."""
    setting = _collection(None, staleness=1)._setting
    used = {0, 2, 4, 6}
    setting.check_room(used, step=1)
    for rank in range(2):
        topology = replace(setting.topology, rank=rank, world_size=2)
        with pytest.raises(ConfigError, match=r"with rl.max_staleness=1, .* over 2 ranks: start .* on as many ranks"):
            replace(setting, topology=topology).check_room(used, step=1)
        replace(setting, topology=topology).check_room({0, 1, 2, 3}, step=1)
