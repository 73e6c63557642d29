"""The dtype of products that `fastest` comes to."""

import json
from pathlib import Path

import pytest
import torch

from moetrain.parallel.config import ParallelConfig
from moetrain.parallel.topology import setup
from moetrain.train.config import ComputeDtype, TrainConfig
from moetrain.train.precision import DTYPES, MACHINE, dtype_of, faster, float32_gain, settle_dtype

FASTEST = TrainConfig(compute_dtype=ComputeDtype.fastest)


@pytest.mark.parametrize(("gain", "taken"), [(0.45, "bfloat16"), (1.2, "bfloat16"), (2.0, "float32"), (50, "float32")])
def test_float32_is_taken_where_its_products_are_clearly_faster(gain: float, taken: str) -> None:
    assert faster(gain) == taken


def test_the_gain_is_that_of_whole_products_and_leaves_the_threads_alone() -> None:
    threads = torch.get_num_threads()
    assert float32_gain() == pytest.approx(float32_gain(), rel=0.25)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("named", list(DTYPES))
def test_a_dtype_that_is_named_is_kept_and_nothing_is_measured(named: ComputeDtype, tmp_path: Path) -> None:
    train = TrainConfig(compute_dtype=named)
    assert settle_dtype(train, folder=tmp_path, topology=setup(ParallelConfig())) == train
    assert not (tmp_path / MACHINE).exists()
    assert dtype_of(named, device=torch.device("cpu")) is named


def test_fastest_is_measured_once_a_folder(tmp_path: Path) -> None:
    topology = setup(ParallelConfig())
    first = settle_dtype(FASTEST, folder=tmp_path, topology=topology).compute_dtype
    ((key, gain),) = json.loads((tmp_path / MACHINE).read_text()).items()
    assert first is faster(gain)
    # A run that goes on, on a machine that would choose otherwise, goes on with what it began with.
    (tmp_path / MACHINE).write_text(json.dumps({key: 0.5 if first is ComputeDtype.float32 else 5.0}))
    assert {first, settle_dtype(FASTEST, folder=tmp_path, topology=topology).compute_dtype} == set(DTYPES)


@pytest.mark.parametrize("content", ["", "[]", '"x"'])
def test_a_file_that_was_torn_is_measured_anew(content: str, tmp_path: Path) -> None:
    (tmp_path / MACHINE).write_text(content)
    settle_dtype(FASTEST, folder=tmp_path, topology=setup(ParallelConfig()))
    assert len(json.loads((tmp_path / MACHINE).read_text())) == 1


def test_an_accelerator_takes_bfloat16() -> None:
    assert dtype_of(ComputeDtype.fastest, device=torch.device("cuda")) is ComputeDtype.bfloat16
