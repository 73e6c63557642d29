"""Two network namespaces are two hosts: torchrun meets across them, and the losses are those of one host."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moetrain.log import read_metrics
from tests.cli.command import ENVIRONMENT, ROOT

TWO_HOSTS = r"""
set -eu
unshare --net sleep 600 & other=$!
trap 'kill $other' EXIT
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
ip link add first type veth peer name second netns $other
ip addr add 10.77.0.1/24 dev first; ip link set first up; ip link set lo up
nsenter --net=/proc/$other/ns/net sh -c 'ip addr add 10.77.0.2/24 dev second; ip link set second up; ip link set lo up'
export NNODES=2 MASTER_ADDR=10.77.0.1 MASTER_PORT=29511 MAX_RESTARTS=0
LOCAL_ADDR=10.77.0.2 NODE_RANK=1 GLOO_SOCKET_IFNAME=second \
    nsenter --net=/proc/$other/ns/net bash "$@" & second=$!
LOCAL_ADDR=10.77.0.1 NODE_RANK=0 GLOO_SOCKET_IFNAME=first bash "$@"
wait $second
"""
"""Argument: what `bash` runs on both."""


def _why_not() -> str | None:
    missing = [tool for tool in ("unshare", "nsenter", "ip") if shutil.which(tool) is None]
    if missing:
        return f"there is no {missing[0]} here (util-linux, iproute2)"
    probe = ["unshare", "-Urn", "sh", "-c", "ip link add first type veth peer name second && unshare --net true"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"no network namespaces here: {done.stderr.strip()}"


def _losses(folder: Path, name: str) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / name / "pretrain/metrics.jsonl") if "loss" in row]


@pytest.mark.timeout(600)
def test_two_hosts_meet_and_their_losses_are_those_of_one(tmp_path: Path) -> None:
    reason = _why_not()
    if reason is not None:
        pytest.skip(reason)
    environment = {**ENVIRONMENT, "VENV": str(Path(sys.executable).parents[1])}
    words = ["pretrain", "model=k2_nano_test", "data=test", "data.seq_len=64", "~data.sources.dialogues"]
    words += ["train.steps=3", "train.rows_per_step=4", "train.rows_per_micro_batch=2", "parallel.expert=2"]
    words += ["run.wandb.mode=disabled", f"run.folder={tmp_path}", "parallel.timeout_s=120"]
    script = str(ROOT / "launch" / "torchrun.sh")
    two = ["unshare", "-Urnm", "bash", "-c", TWO_HOSTS, "bash", script, "1", *words, "run.name=two"]
    one = ["bash", script, "2", *words, "run.name=one"]
    for command in (two, one):
        done = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert len(_losses(tmp_path, "one")) == 3
    assert _losses(tmp_path, "two") == _losses(tmp_path, "one")
