"""Deterministic rollouts are refused where training or generation would compute by other kernels."""

from pathlib import Path

import pytest
import torch

from moetrain.commands.training import RlRun
from moetrain.errors import ConfigError
from moetrain.inference.mode import Mode
from moetrain.kernels import choice
from moetrain.kernels.build import UnavailableError
from moetrain.kernels.config import Kernels
from moetrain.parallel.topology import Topology
from moetrain.rl.config import kernels_for
from moetrain.rollout.config import RolloutConfig
from moetrain.run.rl_stage import check_kernels
from moetrain.train.config import ComputeDtype, TrainConfig
from moetrain.train.precision import resolve_precision

_EXACT = RolloutConfig(mode=Mode.deterministic)


@pytest.mark.parametrize(
    ("fields", "cure"),
    [
        ({"kernels": Kernels.torch}, "train.kernels is torch: .* Give train.kernels=auto, or rollout.mode=fast"),
        ({"compute_dtype": ComputeDtype.float32}, "compute_dtype is float32: .* Give train.compute_dtype=bfloat16"),
    ],
)
def test_training_by_other_kernels_is_refused(fields: dict[str, str], cure: str) -> None:
    train = TrainConfig(**fields)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=cure):
        RlRun(train=train, rollout=_EXACT)
    assert RlRun(train=train).train is train


def test_generation_by_torch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.kernels is torch: .* Give rollout.kernels=auto, or rollout.mode"):
        RolloutConfig(mode=Mode.deterministic, kernels=Kernels.torch)


def test_training_requires_the_native_kernels_instead_of_choosing() -> None:
    assert kernels_for(_EXACT, TrainConfig()).kernels is Kernels.native
    assert kernels_for(RolloutConfig(), TrainConfig()).kernels is Kernels.auto


def test_a_machine_without_a_compiler_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise UnavailableError("no C++ compiler found (g++)")

    monkeypatch.setattr(choice, "load", missing)
    train, topology = kernels_for(_EXACT, TrainConfig()), Topology(device=torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler found .* Give rollout.mode=fast"):
        resolve_precision(train, folder=tmp_path, topology=topology, cure="Give rollout.mode=fast")


def test_an_accelerator_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"deterministic and this run trains on cuda: .* Give rollout.mode=fast"):
        check_kernels(None, Topology(device=torch.device("cuda")))
