"""A whole evaluation: modes that were finished before a stop are kept, and are not those of other weights or tasks."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moetrain.errors import ConfigError
from moetrain.eval.config import EvalConfig
from moetrain.eval.finished import FinishedModes
from moetrain.eval.stage import Contestant, Setting, evaluate
from moetrain.files import to_json
from moetrain.optim.config import OptimConfig
from moetrain.parallel.config import EngineName, ParallelConfig
from moetrain.parallel.engine import build_engine
from moetrain.parallel.topology import setup
from moetrain.quant.config import QuantConfig
from moetrain.rollout.config import RolloutConfig
from moetrain.rollout.sync import sync_weights
from moetrain.rollout.types import Trajectory
from moetrain.tasks.config import TaskConfig
from tests.even_task import MODEL, EvenFamily, even_tokenizer

_PARALLEL = ParallelConfig(engine=EngineName.torch)
_QUANT = QuantConfig(enabled=True)


class _StopError(Exception):
    """The process ends here."""


def _contestant(digest: str) -> Contestant:
    engine = build_engine(
        MODEL, _PARALLEL, optim_config=OptimConfig(), quant_config=_QUANT, compute_dtype=torch.float32, seed=0
    )
    return Contestant(model=sync_weights(engine, config=MODEL, quant=_QUANT, dtype=torch.float32), digest=digest)


def _setting(path: Path, **values: Any) -> Setting:
    return Setting(
        config=EvalConfig(num_tasks=3, temperatures=[1.0, 0.0], longer_calls=[], kl_tasks=2),
        family_of=lambda config: EvenFamily(),
        task=TaskConfig(),
        tokenizer=even_tokenizer(),
        rollout=RolloutConfig(num_slots=4, max_tokens=80, max_turn_tokens=40, max_turns=2),
        seed=3,
        plugins="",
        finished=FinishedModes(path),
        **{"on_finished": lambda mode, trajectories: None, "topology": setup(_PARALLEL), **values},
    )


def test_an_earlier_evaluation_that_has_nothing_in_common_is_refused_or_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    setting, export = _setting(tmp_path / "finished.json"), _contestant("export")
    with pytest.raises(ConfigError, match=r"eval\.before has the modes sampled_t0\.5, and this evaluation sampled_t1"):
        evaluate(setting, export=export, masters=None, before={"modes": {"sampled_t0.5": {"outcomes": {}}}})
    first = evaluate(setting, export=export, masters=None, before=None)
    assert first is not None and "paired" not in first
    before = {
        "modes": {"greedy": first["modes"]["greedy"], "sampled_t1": {"outcomes": {"7/3": True}}},
        "task": {"context": {"kind": "notes"}},
    }
    numbers = evaluate(setting, export=export, masters=None, before=before)
    assert numbers is not None and list(numbers["paired"]) == ["greedy"]
    assert "eval.before had another context policy ({'kind': 'notes'})" in caplog.text
    assert "eval.before has no result of a task of the mode sampled_t1: it is not compared" in caplog.text


def test_a_stop_loses_no_finished_mode_and_other_weights_take_none(tmp_path: Path) -> None:
    path = tmp_path / "finished.json"
    ran: list[str] = []
    keys: list[str] = []
    stop_at: list[str] = []

    def on_finished(result: str, trajectories: list[Trajectory]) -> None:
        mode, _, key = result.rpartition(".")
        if mode in stop_at:
            raise _StopError
        ran.append(mode)
        keys.append(key)

    setting = _setting(path, on_finished=on_finished)
    export, masters = _contestant("export"), _contestant("masters")
    stop_at.append("greedy_error_free")
    with pytest.raises(_StopError):
        evaluate(setting, export=export, masters=masters, before=None)
    assert ran == ["sampled_t1", "greedy"]
    stop_at.clear()
    resumed = FinishedModes(path)
    again = evaluate(replace(setting, finished=resumed), export=export, masters=masters, before=None)
    assert ran == ["sampled_t1", "greedy", "greedy_error_free"]
    assert {*keys} < resumed.used and len(resumed.used) == 5  # also those of the modes that were not run again
    setting.finished.remove()
    assert not path.exists()
    whole = evaluate(replace(setting, finished=FinishedModes(path)), export=export, masters=masters, before=None)
    assert whole is not None and whole["divergence"]["num_tokens"] > 0
    assert to_json(whole) == to_json(again)
    ran.clear()
    other = replace(export, digest="another")
    evaluate(replace(setting, finished=FinishedModes(path)), export=other, masters=None, before=None)
    assert ran == ["sampled_t1", "greedy", "greedy_error_free"]
    ran.clear()
    stop_at.append("greedy")
    edited = replace(setting, plugins="an edited plugin")
    with pytest.raises(_StopError):
        evaluate(replace(edited, finished=FinishedModes(path)), export=other, masters=None, before=None)
    assert ran == ["sampled_t1"]
