"""Trajectories that a killed run had finished are found again, and nothing else is."""

import hashlib
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from moetrain.rollout.collect import RolloutRequest
from moetrain.rollout.journal import Journal, remove_before
from moetrain.rollout.types import Ending, Segment, Trajectory
from moetrain.tasks.protocol import Grade


def _request(number: int) -> RolloutRequest:
    return RolloutRequest(task_index=number, task=None, sample=number % 2, stream=100 + number)  # type: ignore[arg-type]


def finished_trajectory(number: int) -> Trajectory:
    segment = Segment(
        tokens=[number, 2, 3],
        is_sampled=[False, True, True],
        logprobs=[0.0, -1 / 3, -0.1],
        versions=[4, 4, 5],
        temperature=0.7,
    )
    return Trajectory(
        task=number,
        sample=number % 2,
        num_calls_needed=3,
        segments=[segment, segment],
        grade=Grade(reward=0.25, reason="partly", parts={"format": 1 / 7}, threshold=0.5),
        ending=Ending.answered,
        num_turns=2,
        num_calls=1,
        num_errors=0,
        num_transient_errors=0,
        progress=1 / 3,
    )


def _known(journal: Journal, requests: list[RolloutRequest]) -> dict[int, Trajectory]:
    return {place: found for place, request in enumerate(requests) if (found := journal.find(request)) is not None}


def _written(folder: Path, count: int, *, step: int = 4, rank: int = 0) -> Path:
    journal = Journal(folder, step=step, rank=rank, run="a")
    for number in range(count):
        journal.add(_request(number), finished_trajectory(number))
    return folder / f"step_{step:08d}.rank_{rank}.jsonl"


def test_finished_trajectories_are_found_bit_for_bit(tmp_path: Path) -> None:
    _written(tmp_path, 3)
    requests = [_request(number) for number in range(5)]
    assert _known(Journal(tmp_path, step=4, rank=0, run="a"), requests) == {
        number: finished_trajectory(number) for number in range(3)
    }


def test_another_number_of_ranks_finds_them_too_and_another_step_does_not(tmp_path: Path) -> None:
    _written(tmp_path, 3, rank=1)
    assert _known(Journal(tmp_path, step=4, rank=0, run="a"), [_request(2)]) == {0: finished_trajectory(2)}
    assert not _known(Journal(tmp_path, step=5, rank=0, run="a"), [_request(2)])


def test_trajectories_of_another_config_are_neither_found_nor_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    _written(tmp_path, 3)
    other = Journal(tmp_path, step=4, rank=0, run="b")
    other.add(_request(0), finished_trajectory(0))
    assert not _known(other, [_request(1)]) and "were collected" not in caplog.text
    assert _known(Journal(tmp_path, step=4, rank=0, run="b"), [_request(0), _request(1)]) == {0: finished_trajectory(0)}
    assert "step 5: 1 trajectories were collected before the run stopped" in caplog.text


def test_a_request_with_another_stream_is_another_one(tmp_path: Path) -> None:
    _written(tmp_path, 3)
    other = RolloutRequest(task_index=1, task=None, sample=1, stream=7)  # type: ignore[arg-type]
    assert not _known(Journal(tmp_path, step=4, rank=0, run="a"), [other])


@pytest.mark.parametrize("cut", [1, 5, 40, 300])
def test_a_line_that_was_cut_off_is_left_out_and_later_ones_count(
    cut: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = _written(tmp_path, 3)
    path.write_bytes(path.read_bytes()[:-cut])
    again = Journal(tmp_path, step=4, rank=0, run="a")
    again.add(_request(3), finished_trajectory(3))
    known = _known(Journal(tmp_path, step=4, rank=0, run="a"), [_request(number) for number in range(4)])
    assert known == {number: finished_trajectory(number) for number in ({0, 1, 3} if cut > 1 else {0, 1, 2, 3})}
    assert ("was not written to its end" in caplog.text) == (cut > 1)


def test_a_changed_line_is_left_out(tmp_path: Path) -> None:
    path = _written(tmp_path, 1)
    path.write_bytes(path.read_bytes().replace(b"-0.1", b"-0.2"))
    assert not _known(Journal(tmp_path, step=4, rank=0, run="a"), [_request(0)])


def test_the_files_of_steps_that_a_checkpoint_contains_are_removed(tmp_path: Path) -> None:
    for step in (3, 4, 5):
        _written(tmp_path, 1, step=step)
    remove_before(tmp_path, step=4)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "step_00000004.rank_0.jsonl",
        "step_00000005.rank_0.jsonl",
    ]


def test_another_run_in_the_same_folder_finds_nothing(tmp_path: Path) -> None:
    _written(tmp_path, 2)
    assert not _known(Journal(tmp_path, step=4, rank=0, run="b"), [_request(0), _request(1)])


def test_a_line_with_other_fields_is_left_out(tmp_path: Path) -> None:
    path = _written(tmp_path, 2)
    lines = [line.split(b" ", 1)[1] for line in path.read_bytes().split(b"\n") if line]
    lines[0] = lines[0].replace(b'"answered"', b'"gone"')
    written = [hashlib.sha256(line).hexdigest()[:16].encode() + b" " + line for line in lines]
    path.write_bytes(b"\n".join(written))
    assert set(_known(Journal(tmp_path, step=4, rank=0, run="a"), [_request(0), _request(1)])) == {1}


def test_what_a_new_attempt_may_change_is_not_kept(tmp_path: Path) -> None:
    Journal(tmp_path, step=4, rank=0, run="a").add(
        _request(0), replace(finished_trajectory(0), ending=Ending.environment_failed)
    )
    assert not list(tmp_path.iterdir())
