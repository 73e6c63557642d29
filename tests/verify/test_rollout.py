"""`verify rollout`: no token depends on its company, and each planted fault is found."""

import json
import re
from pathlib import Path

import pytest

from moetrain.cli.main import main

WORDS = ["verify", "rollout", "prompt_tokens=70", "new_tokens=3"]


def test_no_token_depends_on_its_company(tmp_path: Path) -> None:
    assert main([*WORDS, f"run.folder={tmp_path}"]) == 0
    rows = json.loads((tmp_path / "default/verify_rollout/verify.json").read_text())["rows"]
    assert len(rows) == 48 and all(row["value"] == 0 for row in rows if "gap" not in row["name"])
    gaps = {row["name"].split(", fast: gap ")[1]: row["value"] for row in rows if "gap" in row["name"]}
    assert len(gaps) == 5 and gaps["by attention over latents"] > 100 * gaps["by the sampler's log-softmax"]
    crowds = [row for row in rows if "others" in row["name"]]
    assert len(crowds) == 12 and all(re.search(r"; [1-9]\d* prompt tokens", row["note"]) for row in crowds)


@pytest.mark.parametrize(
    ("fault", "row"),
    [
        *((fault, "alone and with 6 others") for fault in ("stale_page", "wrong_position", "other_row")),
        ("fast_attention", "deterministic: sampled and trained logprobs"),
    ],
)
def test_a_planted_fault_is_found(fault: str, row: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, f"fault={fault}", f"run.folder={tmp_path}"]) == 3
    assert row in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prompt_tokens=100000"], "prompt_tokens + new_tokens is 100003: give at most 2048"),
        (
            ["prompt_tokens=1", "fault=wrong_position"],
            "fault is wrong_position, prompt_tokens 1 and new_tokens 3",
        ),
    ],
)
def test_sizes_that_take_hours_or_show_no_fault_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*WORDS, *words]) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_fault_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "fault=page"]) == 2
    assert "there are fast_attention, none, other_row, stale_page, wrong_position" in capsys.readouterr().err
