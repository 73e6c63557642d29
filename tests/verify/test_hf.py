"""transformers computes our logits, in every shape and both layouts of experts; planted faults are found."""

import json
from pathlib import Path

import pytest

from moetrain.errors import BoundError
from moetrain.export.folder import write_weights
from moetrain.hf.names import hf_disk_tensors
from moetrain.hf.shape import to_hf_config
from moetrain.model.config import YarnConfig
from moetrain.verify import hf
from moetrain.verify.hf import HfFault, verify_folder, verify_matrix
from moetrain.verify.table import Row, check_rows

SIZES = {"seed": 0, "num_rows": 2, "num_tokens": 40}


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return list(verify_matrix(**SIZES, fault=HfFault.none))


def test_every_shape_of_the_matrix_agrees_with_transformers(rows: list[Row]) -> None:
    names = [row.name for row in rows]
    assert len(set(names)) == 2 * 3 * 2 * 2
    for word in ("q_lora None", "q_lora 24", "YaRN 32, beta_fast 1", "YaRN 40, beta_fast 32", "YaRN 64", "groups 8"):
        assert any(word in name for name in names)
    check_rows(rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf")
    config = hf._tiny(q_lora_rank=24, yarn=YarnConfig(factor=64.0), groups=1)
    (path / "config.json").write_text(json.dumps(to_hf_config(config)))
    write_weights(path, hf_disk_tensors(hf._weights(config, seed=1)), shard_bytes=50_000)
    return path


def test_a_folder_agrees_and_planted_faults_are_found(folder: Path) -> None:
    check_rows([verify_folder(folder, **SIZES, fault=HfFault.none)])
    for fault in (HfFault.norm, HfFault.expert):
        with pytest.raises(BoundError, match=str(folder)):
            check_rows([verify_folder(folder, **SIZES, fault=fault)])
