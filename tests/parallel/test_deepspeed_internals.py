"""The installed DeepSpeed is the one that its replaced internals were written against."""

import deepspeed
import pytest
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from moetrain.errors import ConfigError
from moetrain.parallel.deepspeed_internals import SIGNATURES, WRITTEN_AGAINST, check_contract
from tests.parallel.nano import build


def test_the_installed_deepspeed_keeps_the_contract() -> None:
    assert deepspeed.__version__.split("+")[0] == WRITTEN_AGAINST
    check_contract()


@pytest.mark.parametrize(("owner", "name"), SIGNATURES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_an_internal_with_another_signature_is_refused(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    monkeypatch.setattr(owner, name, lambda other: None)
    with pytest.raises(ConfigError, match=rf"{name} is \(other\), expected .*: install deepspeed=={WRITTEN_AGAINST}"):
        check_contract()


def test_no_engine_is_built_when_an_internal_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(DeepSpeedZeroOptimizer, "average_tensor")
    with pytest.raises(ConfigError, match="average_tensor is missing"):
        build()
