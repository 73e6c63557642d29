"""The dtype of products that `fastest` comes to."""

import json
from pathlib import Path

import pytest
import torch

from moetrain.parallel.config import ParallelConfig
from moetrain.parallel.topology import setup
from moetrain.train.config import ComputeDtype, TrainConfig
from moetrain.train.precision import MACHINE, candidates, faster, settle_dtype

FASTEST = TrainConfig(compute_dtype=ComputeDtype.fastest)


@pytest.mark.parametrize(
    ("bfloat16", "float32", "taken"),
    [(430e9, 190e9, "bfloat16"), (170e9, 330e9, "float32"), (2e9, 100e9, "float32"), (100e9, 120e9, "bfloat16")],
)
def test_float32_is_taken_where_its_products_are_clearly_faster(bfloat16: float, float32: float, taken: str) -> None:
    peaks = {ComputeDtype.bfloat16: bfloat16, ComputeDtype.float32: float32}
    assert faster(peaks) == taken


@pytest.mark.parametrize("named", [ComputeDtype.bfloat16, ComputeDtype.float32])
def test_a_dtype_that_is_named_is_kept_and_nothing_is_measured(named: ComputeDtype, tmp_path: Path) -> None:
    train = TrainConfig(compute_dtype=named)
    assert settle_dtype(train, folder=tmp_path, topology=setup(ParallelConfig())) == train
    assert not (tmp_path / MACHINE).exists()


def test_fastest_is_measured_once_a_folder(tmp_path: Path) -> None:
    topology = setup(ParallelConfig())
    first = settle_dtype(FASTEST, folder=tmp_path, topology=topology)
    measured = json.loads((tmp_path / MACHINE).read_text())
    speed = {name: peak for key, peak in measured.items() for name in ("bfloat16", "float32") if name in key}
    assert first.compute_dtype == faster({ComputeDtype(name): peak for name, peak in speed.items()})
    # A run that goes on, on a machine that would choose otherwise, goes on with what it began with.
    other = ComputeDtype.bfloat16 if first.compute_dtype is ComputeDtype.float32 else ComputeDtype.float32
    told = {key: 9e12 if other in key else 1e9 for key in measured}
    (tmp_path / MACHINE).write_text(json.dumps(told))
    assert settle_dtype(FASTEST, folder=tmp_path, topology=topology).compute_dtype is other


def test_an_accelerator_takes_bfloat16() -> None:
    assert candidates(ComputeDtype.fastest, device=torch.device("cuda")) == [ComputeDtype.bfloat16]
