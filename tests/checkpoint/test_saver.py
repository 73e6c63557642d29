"""Background saving by two ranks: any layout to any other, failing disks, and folders that tell how far a save came."""

import errno
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from moetrain.checkpoint import read as checkpoint
from moetrain.checkpoint import saver
from moetrain.checkpoint import write as checkpoint_write
from moetrain.checkpoint.resume import resume, saved_state
from moetrain.checkpoint.saver import Saver
from moetrain.checkpoint.write import Retention
from moetrain.errors import CheckpointError, SaveError
from moetrain.optim.config import OptimizerName
from moetrain.parallel.config import EngineName
from moetrain.parallel.engine import Engine
from moetrain.parallel.protocol import Piece
from tests.distributed import run_ranks
from tests.parallel.nano import build, difference, identical, train

FP32_ROUNDING = 1e-6  # relative, on loss, gradient norm and clip factor
LAYOUTS = {
    **{f"zero {zero}": (zero, 1) for zero in (1, 2, 3)},
    **{f"zero {zero}, experts split": (zero, 2) for zero in (1, 2, 3)},
}
IDENTITY = {"seed": 1}


def _save(engine: Engine, folder: Path, *, step: int) -> None:
    with Saver(engine.topology, folder, retention=Retention(newest=9)) as writer:
        writer.begin(engine, step=step, state=saved_state(IDENTITY, loop={}, data={"rows_read": 4 * step}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one checkpoint of step 2, written by the plain engine in this process."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("saver")
    engine = build(EngineName.torch)
    train(engine, range(2))
    _save(engine, path / "plain", step=2)
    return path


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(_both_ranks, 2, folder=folder)


def _both_ranks(*, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    seen: dict[str, Any] = {}
    for name, (zero, expert) in LAYOUTS.items():
        engine = build(zero=zero, expert=expert, seed=5)
        resumed = resume(engine, folder / "plain", identity=IDENTITY)
        state = engine.gather_state(with_optimizer=True)
        traces = train(engine, range(2, 4))
        _save(engine, folder / name, step=4)
        seen[name] = {"step": resumed.step, "state": state, "traces": traces}
        seen[name]["saved"] = engine.gather_state(with_optimizer=True)
    split, whole = "zero 2, experts split", build(zero=1, expert=1, seed=6)
    resume(whole, folder / split, identity=IDENTITY)
    seen["from split to whole"] = whole.gather_state(with_optimizer=True)
    seen["files"] = sorted(path.name for path in (folder / split / "step_00000004").iterdir())
    seen["full disk"] = _full_disk(whole, folder / "full")
    seen["not shared"] = _not_shared(whole, folder / "not shared")
    seen["not JSON"] = _not_json(whole, folder / "not JSON")
    seen["damaged"] = _damaged(whole, folder)
    seen["late listing"] = _late_listing(whole, folder / "plain")
    return seen


def _full_disk(engine: Engine, folder: Path) -> dict[str, Any]:
    """Save once, then let the disk of rank 1 be full, and say what each rank met and what is left."""
    _save(engine, folder, step=1)
    original = saver.write_part

    def full(partial: Path, pieces: Sequence[Piece], *, rank: int) -> None:
        if rank == 1:
            (partial / "model-r00001-00001.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(partial, pieces, rank=rank)

    saver.write_part = full
    try:
        with pytest.raises(SaveError) as raised:
            _save(engine, folder, step=2)
    finally:
        saver.write_part = original
    engine.topology.barrier()
    left = sorted(path.name for path in folder.iterdir())
    engine.topology.barrier()
    _save(engine, folder, step=3)
    return {"error": str(raised.value), "left": left, "after": checkpoint.steps(folder)}


def _not_shared(engine: Engine, folder: Path) -> str:
    """Let rank 1 write where the main rank does not see it."""
    original = saver.write_part

    def elsewhere(partial: Path, pieces: Sequence[Piece], *, rank: int) -> None:
        original(Path(tempfile.mkdtemp()) if rank == 1 else partial, pieces, rank=rank)

    saver.write_part = elsewhere
    try:
        with pytest.raises(SaveError) as raised:
            _save(engine, folder, step=1)
    finally:
        saver.write_part = original
    return str(raised.value)


def _not_json(engine: Engine, folder: Path) -> dict[str, Any]:
    """Save a state that JSON does not hold, and then one that it does."""
    with (
        pytest.raises(SaveError) as raised,
        Saver(engine.topology, folder, retention=Retention(newest=9)) as writer,
    ):
        writer.begin(engine, step=1, state={"loss": math.nan})
        writer.finish()
    _save(engine, folder, step=2)
    engine.topology.barrier()
    return {"error": str(raised.value), "left": sorted(path.name for path in folder.iterdir())}


def _late_listing(engine: Engine, folder: Path) -> int:
    """Let the host of rank 1 not see yet what there is in the folder."""
    original = checkpoint.steps
    if not engine.topology.is_main:
        checkpoint.steps = lambda folder: []
    try:
        return resume(engine, folder, identity=IDENTITY).step
    finally:
        checkpoint.steps = original


def _damaged(engine: Engine, folder: Path) -> dict[str, Any]:
    """Let the newest of two checkpoints have a flipped byte in a file that rank 1 wrote."""
    copy = folder / "damaged"
    _save(engine, copy, step=1)
    _save(engine, copy, step=2)
    if engine.topology.is_main:
        path = copy / "step_00000002" / "optimizer-r00001-00001.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    engine.topology.barrier()
    return asdict(resume(engine, copy, identity=IDENTITY))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_of_one_process_goes_on_in_every_layout_of_two(
    folder: Path, ranks: list[dict[str, Any]], name: str
) -> None:
    plain = build(EngineName.torch, seed=7)
    resume(plain, folder / "plain", identity=IDENTITY)
    written = plain.gather_state(with_optimizer=True)
    expected = train(plain, range(2, 4))
    seen = ranks[0][name]
    assert seen["step"] == 2
    assert written is not None and identical(seen["state"], written)
    assert difference(seen["traces"], expected) < FP32_ROUNDING


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("target", list(EngineName))
def test_a_checkpoint_of_every_layout_of_two_processes_goes_on_in_one(
    folder: Path, ranks: list[dict[str, Any]], name: str, target: EngineName
) -> None:
    plain = build(target, seed=7)
    assert resume(plain, folder / name, identity=IDENTITY).step == 4
    state = plain.gather_state(with_optimizer=True)
    assert state is not None and identical(state, ranks[0][name]["saved"])
    assert train(plain, range(4, 5))[0].report.grad_norm > 0


def test_split_experts_arrive_whole_on_both_ranks(ranks: list[dict[str, Any]]) -> None:
    assert identical(ranks[0]["from split to whole"], ranks[0]["zero 2, experts split"]["saved"])


def test_each_rank_writes_its_own_files(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["files"] == [
        "index.json",
        "model-r00000-00001.safetensors",
        "model-r00001-00001.safetensors",
        "optimizer-r00000-00001.safetensors",
        "optimizer-r00001-00001.safetensors",
        "state.json",
    ]


def test_weights_of_a_layout_start_a_run_of_another(folder: Path, ranks: list[dict[str, Any]]) -> None:
    found = checkpoint.load(folder / "zero 1, experts split" / "step_00000004")
    engine = build(EngineName.torch, seed=7)
    engine.load_state(found.tensors.of_model(), with_optimizer=False)
    state = engine.gather_state(with_optimizer=False)
    saved = ranks[0]["zero 1, experts split"]["saved"]
    assert state is not None
    assert identical(state, {name: tensor for name, tensor in saved.items() if not name.startswith("optimizer/")})


def test_a_full_disk_of_one_rank_is_one_error_on_all_and_leaves_what_was_good(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["full disk"] for rank in ranks)
    assert "rank 1 could not write its part: OSError: [Errno 28] No space left on device" in first["error"]
    assert first["error"] == second["error"]
    assert first["left"] == ["step_00000001"]
    assert first["after"] == [1, 3]


def test_a_folder_that_the_ranks_do_not_share_is_said_to_be(ranks: list[dict[str, Any]]) -> None:
    assert "must be on a file system that all hosts share" in ranks[1]["not shared"]


def test_a_state_that_cannot_be_written_is_one_error_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["not JSON"] for rank in ranks)
    assert "checkpoint 1 was not written: ValueError: Out of range float values" in first["error"]
    assert first["error"] == second["error"]
    assert first["left"] == ["step_00000002"]


def test_all_ranks_go_on_from_what_the_main_one_sees(ranks: list[dict[str, Any]]) -> None:
    assert [rank["late listing"] for rank in ranks] == [2, 2]


def test_damage_in_the_share_of_another_rank_is_met_by_all(ranks: list[dict[str, Any]]) -> None:
    assert [rank["damaged"]["step"] for rank in ranks] == [1, 1]
    assert [rank["damaged"]["num_damaged"] for rank in ranks] == [1, 1]


def test_state_tells_position_in_the_data_and_random_streams(folder: Path) -> None:
    state = checkpoint.load(folder / "plain" / "step_00000002").state
    assert state["data"] == {"rows_read": 8}
    assert state["random"]["seed"] == 1
    assert "function of (seed" in state["random"]["rule"]


def test_training_goes_on_while_a_thread_writes_and_the_copy_does_not_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    gate = threading.Event()

    def gated(partial: Path, pieces: Sequence[Piece], *, rank: int) -> None:
        assert gate.wait(60)
        checkpoint_write.write_part(partial, pieces, rank=rank)

    monkeypatch.setattr(saver, "write_part", gated)
    engine = build(EngineName.torch, optimizer=OptimizerName.adamw)
    train(engine, range(1))
    before = engine.gather_state(with_optimizer=True)
    with Saver(engine.topology, tmp_path, retention=Retention(newest=2)) as writer:
        writer.begin(engine, step=1, state={})
        train(engine, range(1, 3))
        writer.poll()
        assert checkpoint.steps(tmp_path) == []
        gate.set()
        writer.finish()
        assert checkpoint.steps(tmp_path) == [1]
        assert writer.take_waited_s() > 0
        assert writer.take_waited_s() == 0
    assert before is not None and identical(dict(checkpoint.load(tmp_path / "step_00000001").tensors), before)


def test_an_error_that_ends_the_run_alone_still_finishes_the_save(tmp_path: Path) -> None:
    engine = build(EngineName.torch)
    with (
        pytest.raises(ConnectionError),
        Saver(engine.topology, tmp_path, retention=Retention(newest=2)) as writer,
    ):
        writer.begin(engine, step=1, state={})
        raise ConnectionError
    assert checkpoint.steps(tmp_path) == [1]


def test_the_newest_and_every_third_checkpoint_stay(tmp_path: Path) -> None:
    engine = build(EngineName.torch)
    with Saver(engine.topology, tmp_path, retention=Retention(newest=2, every=3)) as writer:
        for step in range(1, 9):
            writer.begin(engine, step=step, state={})
    assert checkpoint.steps(tmp_path) == [3, 6, 7, 8]


def test_whole_tensors_stand_in_the_files_under_their_names_and_shapes(folder: Path) -> None:
    with safe_open(folder / "plain" / "step_00000002" / "model-r00000-00001.safetensors", framework="pt") as file:
        assert file.get_tensor("model.layers.1.mlp.experts.gate_up_proj").shape == (4, 64, 32)


def test_a_checkpoint_whose_replacement_was_stopped_is_put_back(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "plain" / "step_00000002", tmp_path / ".step_00000002.replaced.tmp")
    (tmp_path / ".step_00000002.tmp").mkdir()
    (tmp_path / ".step_00000001.removed.tmp").mkdir()
    assert checkpoint.remove_leftovers(tmp_path) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


def test_parts_that_do_not_make_a_tensor_whole_are_no_checkpoint(tmp_path: Path) -> None:
    partial = checkpoint_write.begin(tmp_path, 1)
    half = Piece(name="weight", shape=(4,), start=0, values_P=torch.zeros(2))
    checkpoint_write.write_part(partial, [half], rank=0)
    with pytest.raises(CheckpointError, match=r"weight: its pieces end at element 2, but its shape is \[4\]"):
        checkpoint_write.commit(partial, 1, num_parts=1, state={}, retention=Retention(newest=1))
    assert checkpoint.steps(tmp_path) == []
