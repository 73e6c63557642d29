"""Shards with an index, and folders that appear whole or not at all."""

import json
from pathlib import Path

import pytest
import torch

from moetrain.errors import CheckpointError
from moetrain.export.folder import atomic_folder, open_weights, read_record, write_record, write_weights


def test_shards_hold_every_tensor_once_and_the_index_finds_it(tmp_path: Path) -> None:
    base = torch.arange(40.0).view(4, 10)
    tensors = {f"t{row}": base[row] for row in range(4)}  # views of one storage
    assert write_weights(tmp_path, tensors.items(), shard_bytes=100) == 160
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    files = open_weights(tmp_path)
    assert set(files) == set(tensors)
    assert all(torch.equal(files[name], tensors[name]) for name in tensors)
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["metadata"] == {"total_size": 160}


def test_weights_may_be_read_by_those_who_may_read_the_folder(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as partial:
        write_weights(partial, {"a": torch.ones(2)}.items(), shard_bytes=100)
        (partial / "other").touch()
        (weights,) = partial.glob("*.safetensors")
        assert weights.stat().st_mode == (partial / "other").stat().st_mode


def test_a_block_that_fails_leaves_neither_the_folder_nor_a_part_of_it(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_an_export_to_which_files_were_added_is_kept(tmp_path: Path) -> None:
    def export() -> None:
        with atomic_folder(tmp_path / "out") as partial:
            (partial / "a").write_text("x")
            write_record(partial, {"step": 1})

    export()
    export()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "out" / "NOTES.md").write_text("mine")
    export()
    assert (tmp_path / "out.previous" / "NOTES.md").read_text() == "mine"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "moetrain.json"]


def test_a_missing_file_and_a_missing_folder_are_named(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("x")
        write_record(partial, {"step": 1})
    assert read_record(tmp_path / "out")["step"] == 1
    (tmp_path / "out" / "a").unlink()
    with pytest.raises(CheckpointError, match="a: the file is missing"):
        read_record(tmp_path / "out")
    with pytest.raises(CheckpointError, match="nowhere: there is no such folder"):
        read_record(tmp_path / "nowhere")
