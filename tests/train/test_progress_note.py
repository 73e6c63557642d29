"""The progress line: what comes first, speed, learning rate, memory, validation and the last save."""

import re

import torch

from moetrain.train.progress_note import ProgressNote

CPU = torch.device("cpu")


def test_a_step_of_training_shows_loss_speed_rate_memory_validation_and_save() -> None:
    note = ProgressNote(headline="loss", device=CPU)
    values = {"loss": 2.3831, "tokens": 6428.0, "time/seconds": 2.0, "lr": 6e-3}
    assert re.fullmatch(r"loss 2\.383, 3\.21k tokens/s, lr 6\.0e-03, \d+\.\d GB", note.of(values))
    note.validation = {"validation/code": 2.0, "validation/english": 3.0, "time/validation_s": 9.0}
    note.saved = 100
    assert re.fullmatch(r"loss 2\.383, .*, \d+\.\d GB, val 2\.500, saved 100", note.of(values))


def test_a_step_of_rl_shows_the_speed_of_sampling() -> None:
    note = ProgressNote(headline="reward", device=CPU)
    values = {"reward": 0.5, "sampled_tokens": 5000.0, "tokens": 9000.0, "time/seconds": 2.0}
    assert note.of(values).startswith("reward 0.500, 2.5k tokens/s, ")


def test_the_speed_is_the_mean_of_the_last_steps() -> None:
    note = ProgressNote(headline="loss", device=CPU)
    for _ in range(30):
        note.of({"loss": 1.0, "tokens": 100.0, "time/seconds": 50.0})
    for _ in range(19):
        note.of({"loss": 1.0, "tokens": 100.0, "time/seconds": 1.0})
    assert note.of({"loss": 1.0, "tokens": 300.0, "time/seconds": 3.0}).startswith("loss 1.000, 100 tokens/s, ")
    assert note.of({"loss": 1.0, "tokens": 0.0, "time/seconds": 2.0}).startswith("loss 1.000, 91.3 tokens/s, ")


def test_a_skipped_step_says_so() -> None:
    assert ProgressNote(headline="loss", device=CPU).of({"skipped_steps": 1.0}).startswith("skipped, ")
    assert ProgressNote(headline="reward", device=CPU).of({"unscored": 1.0}).startswith("no reward, ")
