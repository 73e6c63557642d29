"""Checkpoint folders are whole or they are not there, and damage is met with the name of the file."""

import json
import logging
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moetrain.checkpoint import read as checkpoint
from moetrain.checkpoint import write as checkpoint_write
from moetrain.errors import CheckpointError
from moetrain.parallel.protocol import Piece


def _tensors(*, fill: float = 1.0) -> dict[str, torch.Tensor]:
    return {
        "model.weight": torch.full((3, 5), fill),
        "model.bias": torch.arange(4, dtype=torch.int64),
        "optimizer/model.weight/momentum": torch.full((3, 5), -fill),
        "optimizer/step": torch.tensor(7),
    }


def _save(folder: Path, step: int, *, keep: int = 10) -> Path:
    return checkpoint_write.save(folder, step, tensors=_tensors(fill=step), state={"seed": 1}, keep=keep)


def _flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _save_until_killed(folder: Path) -> None:
    step = 0
    while True:
        step += 1
        _save(folder, step, keep=3)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    found = checkpoint.load(_save(tmp_path, 4))
    assert found.step == 4
    assert found.state == {"seed": 1, "step": 4}
    assert set(found.tensors) == set(_tensors())
    for name, tensor in _tensors(fill=4).items():
        assert torch.equal(found.tensors[name], tensor)
        assert found.tensors[name].dtype == tensor.dtype


def test_shards_hold_at_most_the_stated_bytes_and_optimizer_state_has_its_own(tmp_path: Path) -> None:
    tensors = {f"w{i}": torch.full((10,), float(i)) for i in range(5)} | {"optimizer/w0/momentum": torch.zeros(10)}
    path = checkpoint_write.save(tmp_path, 1, tensors=tensors, state={}, keep=1, shard_bytes=80)
    assert sorted(file.name for file in path.glob("*.safetensors")) == [
        "model-r00000-00001.safetensors",
        "model-r00000-00002.safetensors",
        "model-r00000-00003.safetensors",
        "optimizer-r00000-00001.safetensors",
    ]
    found = checkpoint.load(path)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        _save(tmp_path, step, keep=2)
    assert checkpoint.steps(tmp_path) == [3, 4]


def test_a_damaged_newer_checkpoint_never_pushes_out_a_good_one(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    _flip_byte(_save(tmp_path, 9) / "state.json")
    _save(tmp_path, 2, keep=1)
    assert checkpoint.steps(tmp_path) == [2]


@pytest.mark.parametrize("name", ["model-r00000-00001.safetensors", "state.json", "index.json"])
def test_a_flipped_byte_in_any_file_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    path = _save(tmp_path, 1)
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name) as raised:
        checkpoint.load(path)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("name", ["optimizer-r00000-00001.safetensors", "state.json", "index.json"])
def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    path = _save(tmp_path, 1)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: the file is missing"):
        checkpoint.load(path)


def test_a_truncated_index_and_a_missing_folder_are_errors_with_advice(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    (path / "index.json").write_text((path / "index.json").read_text()[:-20])
    with pytest.raises(CheckpointError, match=r"index.json: cannot be read as JSON.*use another checkpoint"):
        checkpoint.load(path)
    with pytest.raises(CheckpointError, match="this checkpoint folder does not exist"):
        checkpoint.load(tmp_path / "step_00000099")


def test_latest_falls_back_over_damaged_checkpoints_with_a_log_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = _save(tmp_path, 1)
    _flip_byte(_save(tmp_path, 2) / "model-r00000-00001.safetensors")
    (_save(tmp_path, 3) / "index.json").unlink()
    with caplog.at_level(logging.WARNING):
        found = checkpoint.latest(tmp_path)
    assert found.path == good
    assert found.num_damaged == 2
    assert sum("falling back" in record.message for record in caplog.records) == 2


def test_latest_of_no_checkpoints_is_none_and_of_none_good_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert checkpoint.latest(tmp_path / "absent").path is None
    _flip_byte(_save(tmp_path, 1) / "state.json")
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(CheckpointError, match="none of the 1 checkpoints here is intact"),
    ):
        checkpoint.latest(tmp_path)
    assert not caplog.records  # the error says it all: there is nothing to fall back to


def test_a_killed_process_leaves_only_whole_checkpoints_and_removable_leftovers(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_save_until_killed, args=(tmp_path,))
    process.start()
    while not checkpoint.steps(tmp_path):
        pass
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    (tmp_path / ".step_00009999.tmp").mkdir()
    assert checkpoint.remove_leftovers(tmp_path) >= 1
    assert not list(tmp_path.glob(".*"))
    assert checkpoint.latest(tmp_path).num_damaged == 0


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    _flip_byte(_save(tmp_path, 5) / "state.json")
    path = _save(tmp_path, 5)
    assert checkpoint.load(path).step == 5
    assert json.loads((path / "state.json").read_text())["seed"] == 1
    assert not list(tmp_path.glob(".*"))


def test_the_format_of_whole_tensors_is_read_on(tmp_path: Path) -> None:
    path = tmp_path / "step_00000007"
    path.mkdir()
    save_file(_tensors(), path / "model-00001-of-00001.safetensors")
    (path / "state.json").write_text(json.dumps({"step": 7, "seed": 1}))
    files = {file.name: checkpoint.fingerprint(file) for file in sorted(path.iterdir())}
    file_of = dict.fromkeys(_tensors(), "model-00001-of-00001.safetensors")
    index = {"format": 1, "step": 7, "files": files, "tensors": file_of}
    (path / "index.json").write_text(checkpoint.canonical_json({**index, "sha256": checkpoint.index_digest(index)}))
    found = checkpoint.load(path)
    assert (found.step, found.state["seed"]) == (7, 1)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in _tensors().items())


def test_any_flat_range_of_a_tensor_is_read(tmp_path: Path) -> None:
    tensor = torch.arange(60.0).view(3, 4, 5)
    partial = checkpoint_write.begin(tmp_path, 1)
    for rank, (first, last) in enumerate([(0, 7), (7, 41), (41, 60)]):
        piece = Piece(name="w", shape=(3, 4, 5), start=first, values_P=tensor.view(-1)[first:last])
        checkpoint_write.write_part(partial, [piece], rank=rank)
    path = checkpoint_write.commit(partial, 1, num_parts=3, state={}, retention=checkpoint_write.Retention(newest=1))
    whole = checkpoint.load(checkpoint_write.save(tmp_path, 2, tensors={"w": tensor}, state={}, keep=2)).tensors
    pieces = checkpoint.load(path).tensors
    assert torch.equal(pieces["w"], tensor)
    for first, last in [(0, 60), (0, 1), (6, 8), (19, 21), (40, 42), (59, 60), (12, 12)]:
        for tensors in (pieces, whole):
            assert torch.equal(tensors.read("w", first=first, last=last), tensor.view(-1)[first:last])
