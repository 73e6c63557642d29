"""What a dry run prints of time, from a given or a measured speed of one device."""

import re

import pytest

from moetrain.commands.training import PretrainRun
from moetrain.compose import compose
from moetrain.errors import ConfigError
from moetrain.run.dry_run import plan_of, show, time_in_words


def _run(*words: str) -> PretrainRun:
    run = compose("pretrain", ["model=k2_nano_test", "data=test", *words])
    assert isinstance(run, PretrainRun)
    return run


def _time(capsys: pytest.CaptureFixture[str], run: PretrainRun, *, world_size: int) -> float:
    """Return the seconds that the dry run states."""
    show("pretrain", run, world_size=world_size)
    (words,) = re.findall(rf"time at 15% of {world_size} x this peak, at most\s*│ (\S+)", capsys.readouterr().out)
    seconds = 0
    for part in words.split(":"):
        seconds = 60 * seconds + int(part)
    return seconds


def test_the_time_is_that_of_all_devices_at_the_given_peak(capsys: pytest.CaptureFixture[str]) -> None:
    run = _run("device_tflops=0.001")
    plan = plan_of(run, world_size=1)
    assert plan is not None
    alone, together = (_time(capsys, run, world_size=ranks) for ranks in (1, 4))
    assert alone == pytest.approx(plan.flops / (1e9 * 0.15), abs=1)
    assert alone > 10
    assert together == pytest.approx(alone / 4, abs=1)


def test_the_peak_names_its_device_and_a_recipe_gives_one_for_all_stages(capsys: pytest.CaptureFixture[str]) -> None:
    run = _run("device_tflops=0.001")
    show("pretrain", run, world_size=1, device_tflops=989.0)
    assert re.search(r"one device, from device_tflops\s*│ 989,000 GFLOP/s", capsys.readouterr().out)
    show("pretrain", _run(), world_size=1)
    assert re.search(r"measured here, one (cpu|cuda) device\s*│ [\d,]+ GFLOP/s", capsys.readouterr().out)


def test_the_memory_of_rl_is_that_of_one_rank_and_of_its_longest_row() -> None:
    def bytes_per_rank(limit: int, *, world_size: int) -> int:
        words = [f"rl.tokens_per_micro_batch={limit}", "rollout.max_tokens=512"]
        plan = plan_of(compose("rl", words), world_size=world_size)
        assert plan is not None
        return plan.bytes_activations

    assert (
        bytes_per_rank(4096, world_size=1)
        == bytes_per_rank(4096, world_size=4)
        == 8 * bytes_per_rank(512, world_size=1)
    )
    assert bytes_per_rank(128, world_size=1) == bytes_per_rank(512, world_size=1)  # a long row is a micro-batch alone


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(59, "0:59"), (86_400 * 2 - 1, "47:59:59"), (86_400 * 3, "3.0 days"), (643_227 * 3600, "73.4 years")],
)
def test_long_times_are_given_in_days_or_years(seconds: float, words: str) -> None:
    assert time_in_words(seconds) == words


@pytest.mark.parametrize("tflops", [0.0, -1.0, float("nan"), float("inf")])
def test_a_speed_that_no_device_has_is_refused(tflops: float) -> None:
    with pytest.raises(ConfigError, match="device_tflops is"):
        _run(f"device_tflops={tflops}")
