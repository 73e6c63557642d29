"""Two network namespaces are two hosts: torchrun meets across them, and the losses are those of one host.

The second has its own processes too, so that no rank finds the other's memory.

Two launchers on one machine are two hosts to an elastic restart.
"""

import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from moetrain.log import read_metrics
from moetrain.runtime import free_port
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
    nsenter --net=/proc/$other/ns/net unshare --pid --fork --mount-proc bash "$@" & second=$!
LOCAL_ADDR=10.77.0.1 NODE_RANK=0 GLOO_SOCKET_IFNAME=first bash "$@"
wait $second
"""
"""Argument: what `bash` runs on both."""


WORDS = ["pretrain", "model=k2_nano_test", "data=test", "data.seq_len=64", "~data.sources.dialogues"]
WORDS += ["train.rows_per_step=4", "train.rows_per_micro_batch=2", "parallel.expert=2"]
WORDS += ["run.wandb.mode=disabled", "parallel.timeout_s=120"]

ONE_DIES = """
import os, signal, threading, time
from pathlib import Path

folder, host = Path(os.environ["FOLDER"]), os.environ["HOST"]
stopped, died, metrics = folder / "stopped", folder / "died", folder / "elastic/pretrain/metrics.jsonl"

def wait_and_kill(there, mine, number):
    while not there():
        time.sleep(0.01)
    mine.touch()
    os.kill(os.getpid(), number)

if "RANK" in os.environ and not died.exists():
    there = (lambda: metrics.exists() and metrics.read_text()) if host == "first" else stopped.exists
    values = (there, stopped, signal.SIGSTOP) if host == "first" else (there, died, signal.SIGKILL)
    threading.Thread(target=wait_and_kill, args=values, daemon=True).start()
elif "RANK" in os.environ:
    (folder / host).write_text(os.environ["TORCHELASTIC_RESTART_COUNT"])
"""
"""A plugin: the first host's rank stands still, so that it does not fail when the second one's dies."""


def _why_not() -> str | None:
    missing = [tool for tool in ("unshare", "nsenter", "ip") if shutil.which(tool) is None]
    if missing:
        return f"there is no {missing[0]} here (util-linux, iproute2)"
    probe = [
        "unshare",
        "-Urn",
        "sh",
        "-c",
        "ip link add first type veth peer name second && unshare --net --pid --fork --mount-proc true",
    ]
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
    words = [*WORDS, "train.steps=3", f"run.folder={tmp_path}"]
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


@pytest.mark.timeout(600)
def test_launchers_that_count_restarts_differently_meet_again(tmp_path: Path) -> None:
    plugin = tmp_path / "one_dies.py"
    plugin.write_text(ONE_DIES)
    words = [*WORDS, "train.steps=30", f"run.folder={tmp_path}", "run.name=elastic", f"plugins=[{plugin}]"]
    environment = {**ENVIRONMENT, "VENV": str(Path(sys.executable).parents[1]), "FOLDER": str(tmp_path)}
    environment |= {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "LOCAL_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(free_port()), "MAX_RESTARTS": "2", "SAVE_SECONDS": "1"}
    command = ["bash", str(ROOT / "launch" / "torchrun.sh"), "1", *words]
    hosts = ("first", "second")
    with ExitStack() as stack:
        launchers = []
        for host in hosts:
            log = stack.enter_context((tmp_path / f"{host}.log").open("w"))
            launcher = subprocess.Popen(command, env={**environment, "HOST": host}, cwd=ROOT, stdout=log, stderr=log)
            stack.callback(launcher.wait)
            stack.callback(launcher.terminate)  # it ends its ranks
            launchers.append(launcher)
        codes = [launcher.wait(timeout=200) for launcher in launchers]
    assert codes == [0, 0], (tmp_path / "second.log").read_text()[-3000:]
    assert [(tmp_path / host).read_text() for host in hosts] == ["0", "1"]
    assert len(_losses(tmp_path, "elastic")) == 30
