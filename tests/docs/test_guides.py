"""The guides are followed word for word: their files are written, their commands run in the order they stand."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from moetrain.compose import compose
from moetrain.hf.shape import to_hf_config
from moetrain.log import read_metrics
from moetrain.model.config import ModelConfig
from tests.cli.command import ENVIRONMENT, ROOT

DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"# ([\w./-]+\.(?:py|yaml))\n")


def follow(guide: str, folder: Path) -> str:
    """Write each file block whose first line is its path, run each `sh` block, and return what was printed."""
    environment = {**ENVIRONMENT, "PATH": f"{_commands(folder)}{os.pathsep}{os.environ['PATH']}"}
    printed = ""
    for language, content in BLOCK.findall((DOCS / guide).read_text(encoding="utf-8")):
        name = FILE_NAME.match(content)
        if name and language in ("python", "yaml"):
            path = folder / name.group(1)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
        elif language == "sh":
            command = ["bash", "-euo", "pipefail", "-c", content]
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=500
            )
            assert done.returncode == 0, f"{content}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            printed += done.stdout
    return printed


def _commands(folder: Path) -> Path:
    """Return a folder with `moetrain` and `python` of the interpreter that runs the tests."""
    commands = folder / ".commands"
    commands.mkdir(parents=True)
    for name, words in (("moetrain", "-m moetrain.cli"), ("python", "")):
        script = commands / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        script.chmod(0o755)
    return commands


def test_the_guide_to_models_can_be_followed(tmp_path: Path) -> None:
    printed = follow("add-a-model.md", tmp_path)
    assert "parameters" in printed and "memory per rank" in printed
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(ModelConfig(num_experts=16))))
    run = compose("sft", [f"init_from={tmp_path}", "model.yarn.factor=4", "model.max_position_embeddings=8192"])
    assert (run.model.num_experts, run.model.yarn.factor, run.model.max_position_embeddings) == (16, 4, 8192)


def test_the_guide_to_data_can_be_followed(tmp_path: Path) -> None:
    follow("add-data.md", tmp_path)
    summary = json.loads((tmp_path / "runs" / "mixture" / "sft" / "summary.json").read_text())
    assert summary["documents"].keys() == {"notes", "chats", "quiz"}


def test_the_guide_to_rl_losses_can_be_followed(tmp_path: Path) -> None:
    printed = follow("add-an-rl-loss.md", tmp_path)
    assert "capped 1 of 2" in printed
    summary = json.loads((tmp_path / "runs" / "toy" / "rl" / "summary.json").read_text())
    assert summary["steps"] == 1
    (step,) = read_metrics(tmp_path / "runs" / "toy" / "rl" / "metrics.jsonl")
    assert step["grad_norm"] > 0 and step["capped"] == 0.0


def test_the_guide_to_environments_can_be_followed(tmp_path: Path) -> None:
    printed = follow("add-an-environment.md", tmp_path)
    assert "<|tool_call_begin|>functions.read:0" in printed
    graders = json.loads((tmp_path / "runs" / "chase" / "eval" / "eval.json").read_text())["graders"]
    assert (graders["null_policy"], graders["perfect_demonstrator"]) == (0.0, 1.0)
