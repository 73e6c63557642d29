"""The dtype of products that `fastest` comes to."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moetrain.errors import ConfigError
from moetrain.kernels import choice
from moetrain.kernels.build import UnavailableError, load
from moetrain.kernels.config import Kernels
from moetrain.parallel.config import ParallelConfig
from moetrain.parallel.topology import setup
from moetrain.stage_files import MACHINE
from moetrain.train.config import ComputeDtype, TrainConfig
from moetrain.train.precision import (
    DTYPES,
    ResolvedPrecision,
    expected_precision,
    faster_dtype,
    float32_speedup,
    resolve_dtype,
    resolve_precision,
)

FASTEST = TrainConfig(compute_dtype=ComputeDtype.fastest, kernels=Kernels.torch)
CPU = torch.device("cpu")


@pytest.mark.parametrize(("gain", "taken"), [(0.45, "bfloat16"), (1.2, "bfloat16"), (2.0, "float32"), (50, "float32")])
def test_float32_is_taken_where_its_products_are_clearly_faster(gain: float, taken: str) -> None:
    assert faster_dtype(gain) == taken


def test_the_gain_is_that_of_whole_products_and_leaves_the_threads_alone() -> None:
    threads = torch.get_num_threads()
    pairs = ((float32_speedup(), float32_speedup()) for _ in range(5))  # other programs may disturb some
    assert any(one == pytest.approx(other, rel=0.25) for one, other in pairs)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("named", list(DTYPES))
def test_a_dtype_that_is_named_is_kept_and_nothing_is_measured(named: ComputeDtype, tmp_path: Path) -> None:
    train = TrainConfig(compute_dtype=named, kernels=Kernels.torch)
    assert resolve_precision(train, folder=tmp_path, topology=setup(ParallelConfig())) == ResolvedPrecision(
        train=train, library=None
    )
    assert json.loads((tmp_path / MACHINE).read_text()) == {"native kernels": 0.0}
    assert resolve_dtype(train, device=CPU) is named


def test_fastest_is_measured_once_a_folder(tmp_path: Path) -> None:
    topology = setup(ParallelConfig())
    first = resolve_precision(FASTEST, folder=tmp_path, topology=topology).train.compute_dtype
    known = json.loads((tmp_path / MACHINE).read_text())
    (key,) = known.keys() - {"native kernels"}
    assert first is faster_dtype(known[key])
    # A resumed run keeps what it started with, even on a machine that would choose otherwise.
    (tmp_path / MACHINE).write_text(json.dumps(known | {key: 0.5 if first is ComputeDtype.float32 else 5.0}))
    assert {first, resolve_precision(FASTEST, folder=tmp_path, topology=topology).train.compute_dtype} == set(DTYPES)


@pytest.mark.parametrize("content", ["", "[]", '"x"'])
def test_a_file_that_was_torn_is_measured_anew(content: str, tmp_path: Path) -> None:
    (tmp_path / MACHINE).write_text(content)
    resolve_precision(FASTEST, folder=tmp_path, topology=setup(ParallelConfig()))
    assert len(json.loads((tmp_path / MACHINE).read_text())) == 2


def test_an_accelerator_takes_bfloat16() -> None:
    assert resolve_dtype(FASTEST, device=torch.device("cuda")) is ComputeDtype.bfloat16


def test_fastest_is_bfloat16_with_the_native_kernels_which_are_handed_back(tmp_path: Path) -> None:
    train = TrainConfig(compute_dtype=ComputeDtype.fastest, kernels=Kernels.native)
    resolved = resolve_precision(train, folder=tmp_path, topology=setup(ParallelConfig()))
    assert resolved.train == TrainConfig(compute_dtype=ComputeDtype.bfloat16, kernels=Kernels.native)
    assert resolved.library is load()
    assert json.loads((tmp_path / MACHINE).read_text()) == {"native kernels": 1.0}
    assert resolve_precision(FASTEST, folder=tmp_path, topology=setup(ParallelConfig())).library is None


def test_what_is_settled_here_is_what_a_check_says_beforehand(tmp_path: Path) -> None:
    for index, train in enumerate((TrainConfig(compute_dtype=ComputeDtype.fastest), FASTEST, TrainConfig())):
        found = resolve_precision(train, folder=tmp_path / str(index), topology=setup(ParallelConfig()))
        assert expected_precision(train, device=CPU, folder=tmp_path / str(index))[0] is found.train.compute_dtype


def test_float32_is_torchs_and_native_float32_is_refused(tmp_path: Path) -> None:
    resolved = resolve_precision(
        TrainConfig(compute_dtype=ComputeDtype.float32), folder=tmp_path, topology=setup(ParallelConfig())
    )
    assert resolved.train.kernels is Kernels.torch
    with pytest.raises(ConfigError, match=r"train\.kernels is native, which supports only bfloat16"):
        TrainConfig(compute_dtype=ComputeDtype.float32, kernels=Kernels.native)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return what takes the compiler away."""

    def unavailable() -> None:
        raise UnavailableError("no compiler")

    return lambda: monkeypatch.setattr(choice, "load", unavailable)


def test_native_where_it_cannot_be_had_is_refused(tmp_path: Path, no_compiler: Callable[[], None]) -> None:
    no_compiler()
    with pytest.raises(ConfigError, match="no compiler"):
        resolve_precision(TrainConfig(kernels=Kernels.native), folder=tmp_path, topology=setup(ParallelConfig()))


@pytest.mark.parametrize("compute_dtype", [ComputeDtype.fastest, ComputeDtype.bfloat16])
def test_a_run_goes_on_with_the_kernels_it_began_with(
    compute_dtype: ComputeDtype, tmp_path: Path, no_compiler: Callable[[], None]
) -> None:
    train, topology = TrainConfig(compute_dtype=compute_dtype), setup(ParallelConfig())
    native, plain, older = tmp_path / "native", tmp_path / "plain", tmp_path / "older"
    begun = resolve_precision(replace(train, kernels=Kernels.native), folder=native, topology=topology)
    assert resolve_precision(train, folder=native, topology=topology) == begun
    resolve_precision(replace(train, kernels=Kernels.torch), folder=plain, topology=topology)
    assert resolve_precision(train, folder=plain, topology=topology).train.kernels is Kernels.torch
    older.mkdir()
    (older / MACHINE).write_text(json.dumps({"speed of float32 products over bfloat16 ones": 5.0}))
    assert resolve_precision(train, folder=older, topology=topology).train.kernels is Kernels.torch
    assert expected_precision(train, device=CPU, folder=older)[0] in (ComputeDtype.float32, compute_dtype)
    no_compiler()
    for goes_on in (
        lambda: resolve_precision(train, folder=native, topology=topology),
        lambda: expected_precision(train, device=CPU, folder=native),
    ):
        with pytest.raises(ConfigError, match=r"no compiler\. This stage started with native kernels"):
            goes_on()
