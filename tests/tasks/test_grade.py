"""Verdicts of environments: numbers of any kind become floats, and what cannot be learned from is refused."""

import json
import math

import numpy as np
import pytest
import torch

from moetrain.errors import DataError
from moetrain.tasks.protocol import Grade


@pytest.mark.parametrize("number", [1, True, np.float32(1), np.int64(1), torch.tensor(1.0)])
def test_a_number_of_any_kind_is_a_reward(number: float) -> None:
    grade = Grade(reward=number, reason="right", parts={"speed": number}, threshold=number)
    assert json.dumps([grade.reward, dict(grade.parts), grade.threshold]) == '[1.0, {"speed": 1.0}, 1.0]'
    assert grade.success


@pytest.mark.parametrize("number", [math.nan, math.inf, 1e300, "1", None, [1.0], torch.ones(2)])
def test_a_number_that_has_no_finite_advantage_is_refused(number: float) -> None:
    wrong = [{"parts": {"speed": number}}, {"threshold": number}, *([] if number is None else [{"reward": number}])]
    for members in wrong:
        with pytest.raises(ValueError, match=r"of a Grade is .*: give a number from -1e9 to 1e9"):
            Grade(**{"reward": 1.0, "reason": "right", **members})


def test_a_reason_is_text() -> None:
    assert Grade(success=False, reason="a\ud83d").reason == "a\ufffd"
    with pytest.raises(DataError, match="reason of a Grade is list"):
        Grade(success=False, reason=["wrong"])  # type: ignore[arg-type]
