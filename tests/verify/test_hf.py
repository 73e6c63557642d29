"""transformers computes our logits, in every shape and both layouts of experts; planted faults are found."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from moetrain.commands.verify import HfFault
from moetrain.errors import BoundError, ConfigError
from moetrain.export.folder import write_weights
from moetrain.hf.names import hf_disk_tensors
from moetrain.hf.shape import to_hf_config
from moetrain.model.config import ScoreFunction, YarnConfig
from moetrain.verify import hf
from moetrain.verify.hf import verify_folder, verify_matrix
from moetrain.verify.table import Row, check_rows

SIZES = {"seed": 0, "num_rows": 2, "num_tokens": 40}


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return list(verify_matrix(**SIZES, fault=HfFault.none))


def test_every_shape_of_the_matrix_agrees_with_transformers(rows: list[Row]) -> None:
    names = [row.name for row in rows]
    assert len(set(names)) == len(names) == 2 * 3 * 2 * 2 + len(hf.VARIANTS)
    for word in ("q_lora None", "q_lora 24", "YaRN 32, beta_fast 1", "YaRN 40, beta_fast 32", "YaRN 64", "groups 8"):
        assert any(word in name for name in names)
    check_rows(rows)


def test_what_transformers_does_not_compute_is_refused_and_would_miss_the_bound(
    rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = {row.name.removesuffix(": export allowed") for row in rows if row.note.startswith("refused")}
    assert refused == {
        "score_function softmax",
        "score_function sqrt_softplus",
        "num_groups 16, num_groups_per_token 8",
    }
    config = replace(hf._TINY, score_function=ScoreFunction.softmax)
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(config)))
    write_weights(tmp_path, hf_disk_tensors(hf._weights(config, seed=1)), shard_bytes=50_000)
    with pytest.raises(ConfigError, match=r"transformers does not compute this model .*score_function=softmax"):
        verify_folder(tmp_path, **SIZES, fault=HfFault.none)
    monkeypatch.setattr(hf, "obstacles", lambda *_: [])
    assert not verify_folder(tmp_path, **SIZES, fault=HfFault.none).is_kept


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf")
    config = replace(hf._TINY, q_lora_rank=24, yarn=YarnConfig(factor=64.0))
    (path / "config.json").write_text(json.dumps(to_hf_config(config)))
    write_weights(path, hf_disk_tensors(hf._weights(config, seed=1)), shard_bytes=50_000)
    return path


def test_shards_without_an_index_are_compared_by_their_values(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "shards")
    (copied / "model.safetensors.index.json").unlink()
    row = verify_folder(copied, **SIZES, fault=HfFault.none)
    assert row.name == f"{copied}, read by this package for both"
    check_rows([row])


def test_a_folder_agrees_and_planted_faults_are_found(folder: Path) -> None:
    check_rows([verify_folder(folder, **SIZES, fault=HfFault.none)])
    for fault in (HfFault.norm, HfFault.expert):
        with pytest.raises(BoundError, match=str(folder)):
            check_rows([verify_folder(folder, **SIZES, fault=fault)])
