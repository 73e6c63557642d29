"""launch/deepspeed.sh and launch/slurm.sbatch. Small programs that record stand in for Slurm, ssh and pdsh."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moetrain.runtime import free_port
from tests.cli.command import ENVIRONMENT, ROOT

TIMEOUT_S = 120
JOB = {"SLURM_JOB_ID": "61234", "SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_NNODES": "2"}
LINE = ["pretrain", "model=k2_nano_test", "data=test", "parallel.expert=2"]
# One with a space and one without, of characters that a shell would take for its own.
ODD_WORDS = ["run.folder='runs \"of\" $HOME'", "run.name='a;b$HOME{1,2}'"]

SCONTROL = 'if [[ "$1" == show ]]; then printf "node-1\\nnode-2\\n"; else echo "$*" >>scontrol; fi'
# srun passes a signal on to its step, which ends with the code that the test asks for.
SRUN = """
printf '%s\\n' "$@" >srun_words
env >srun_environment
[[ -n "${ENDS:-}" ]] && exit "$ENDS"
trap 'exit "$AFTER_TERM"' TERM
echo $$ >srun_pid.new && mv srun_pid.new srun_pid
while true; do sleep 0.1; done
"""
SCANCEL = 'echo "$*" >>scancel; [[ -n "${NO_SCANCEL:-}" ]] && exit 1; kill -TERM "$(cat srun_pid)"'
# As pdsh does: the words become one line, which a shell of each host reads.
PDSH = """
printf '%s\\n' "$@" >pdsh_words
shift 5
line="$*"
bash -c "printf '%s\\n' ${line#*moetrain.cli }" >received
"""


def write_program(folder: Path, *, name: str, text: str) -> None:
    (folder / "bin").mkdir(exist_ok=True)
    path = folder / "bin" / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def environment_of(folder: Path, **more: str) -> dict[str, str]:
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    return {**ENVIRONMENT, "PATH": path, "VENV": sys.prefix, **more}


def run(script: str, *words: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "launch" / script), *words]
    environment = environment_of(folder, **more)
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """Return a folder to submit from, whose bin/ has what a machine with Slurm has."""
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN), ("scancel", SCANCEL)):
        write_program(tmp_path, name=name, text=text)
    return tmp_path


@pytest.mark.parametrize("script", ["deepspeed.sh", "slurm.sbatch"])
def test_help_and_a_missing_command_show_the_usage(script: str, tmp_path: Path) -> None:
    for words, code in ((["--help"], 0), (["-h"], 0), ([], 2)):
        done = run(script, *words, folder=tmp_path)
        said = done.stdout if code == 0 else done.stderr
        assert done.returncode == code
        assert said.startswith("usage: ")
        assert said.count("\n") == 1
        assert done.stdout + done.stderr == said


@pytest.mark.parametrize("script", ["install.sh", "quickstart.sh", "test.sh", "peers.sh"])
def test_help_of_a_script_that_installs_says_what_it_does_and_does_nothing(script: str, tmp_path: Path) -> None:
    done = run(script, "--help", folder=tmp_path, VENV=str(tmp_path / "venv"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(("Creates", "From", "Installs", "Makes"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        ("node-1 slots=0\n", "hosts:1 is not a line like: node-1 slots=8"),
        ("# all\n\nnode-1\n", "hosts:3 is not a line like: node-1 slots=8"),
        ("node-1 slots=2\nnode-1 slots=2\n", "hosts:2 names node-1 again: give each machine one line"),
        ("# none\n", "hosts names no machine: give lines like: node-1 slots=8"),
    ],
)
def test_a_mistake_in_the_host_file_is_one_line(hosts: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(hosts)
    done = run("deepspeed.sh", "hosts", *LINE, folder=tmp_path)
    assert (done.returncode, done.stderr) == (2, f"deepspeed.sh: {message}\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nope", "pretrain"], "deepspeed.sh: there is no host file nope: give one like launch/hostfile.example"),
        (["0", "pretrain"], "deepspeed.sh: there is no host file 0"),
        (["2", "run", "recipe=k2_nano"], "deepspeed.sh: a recipe starts its ranks itself"),
        (["3", *LINE], "moetrain: parallel.expert is 2: it must divide the number of processes"),
        (["hosts", *LINE], "moetrain: parallel.expert is 2: it must divide the number of processes"),
    ],
)
def test_deepspeed_starts_no_rank_for_bad_input(words: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("node-1 slots=2\n  node-2 slots=1 # small\n")
    write_program(tmp_path, name="python", text=f'exec {sys.executable} "$@"')
    write_program(tmp_path, name="deepspeed", text="touch started")
    done = run("deepspeed.sh", *words, folder=tmp_path, VENV=str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "started").exists()


def test_words_reach_the_ranks_of_several_machines_unchanged(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# two\nnode-1 slots=2\nnode-2 slots=2\n")
    write_program(tmp_path, name="ssh", text="echo 10.0.0.1")
    write_program(tmp_path, name="pdsh", text=PDSH)
    done = run("deepspeed.sh", "hosts", *LINE, *ODD_WORDS, folder=tmp_path, MASTER_PORT="23456")
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "received").read_text().splitlines() == [*LINE, *ODD_WORDS]
    passed = (tmp_path / "pdsh_words").read_text().splitlines()
    assert passed[passed.index("-w") + 1] == "node-1,node-2"
    assert {"--master_addr=10.0.0.1", "--master_port=23456", "--module", "--no_local_rank"} <= set(passed)


def test_deepspeed_trains_on_two_ranks_of_this_machine(tmp_path: Path) -> None:
    words = [*LINE, "train.steps=1", "train.rows_per_micro_batch=8", "run.folder='two ranks'"]
    done = run("deepspeed.sh", "2", *words, folder=tmp_path, MASTER_PORT=str(free_port()))
    assert done.returncode == 0, done.stderr[-4000:]
    assert list((tmp_path / "two ranks").rglob("metrics.jsonl"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "recipe=k2_nano"], "slurm.sbatch: a recipe starts its ranks itself"),
        (["pretrain", "train.stesp=3"], "moetrain: train.stesp: there is no 'stesp' in train; did you mean steps?"),
        (["pretrain", "parallel.expert=8"], "moetrain: parallel.expert is 8: it must divide the number of processes"),
    ],
)
def test_slurm_starts_no_step_for_bad_input(words: list[str], message: str, job: Path) -> None:
    done = run("slurm.sbatch", *words, folder=job, **JOB, SLURM_SUBMIT_DIR=str(job), SLURM_GPUS_ON_NODE="2")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (job / "srun_words").exists()


@pytest.mark.parametrize("code", [0, 3])
def test_a_job_that_ends_by_itself_is_not_queued_again(code: int, job: Path) -> None:
    more = {**JOB, "SLURM_SUBMIT_DIR": str(job), "SLURM_GPUS_ON_NODE": "2", "SLURM_CPUS_PER_TASK": "16"}
    done = run("slurm.sbatch", *LINE, *ODD_WORDS, folder=job, **more, ENDS=str(code))
    assert (done.returncode, done.stderr) == (code, "")
    passed = (job / "srun_words").read_text().splitlines()
    assert passed == ["bash", "launch/torchrun.sh", "2", *LINE, *ODD_WORDS]
    environment = (job / "srun_environment").read_text().splitlines()
    expected = {"NNODES=2", "MASTER_ADDR=node-1", "MASTER_PORT=21234", "RUN_ID=61234", "SRUN_CPUS_PER_TASK=16"}
    assert expected <= set(environment)
    assert not (job / "scontrol").exists()


@pytest.mark.parametrize(
    ("number", "after_term", "no_scancel"),
    [(signal.SIGUSR1, 143, ""), (signal.SIGTERM, 1, "yes"), (signal.SIGUSR1, 0, "")],
)
def test_a_job_that_is_asked_to_stop_is_queued_again_unless_it_was_done(
    number: int, after_term: int, no_scancel: str, job: Path
) -> None:
    more = {**JOB, "SLURM_SUBMIT_DIR": str(job), "AFTER_TERM": str(after_term), "NO_SCANCEL": no_scancel}
    command = ["bash", str(ROOT / "launch" / "slurm.sbatch"), *LINE]
    with subprocess.Popen(command, cwd=job, env=environment_of(job, **more)) as script:
        try:
            deadline = time.monotonic() + TIMEOUT_S
            while not (job / "srun_pid").exists():
                assert script.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            time.sleep(0.5)  # the script has set its trap by then
            script.send_signal(number)
            assert script.wait(timeout=TIMEOUT_S) == after_term
        finally:
            script.kill()
    assert (job / "scancel").read_text() == "--signal=TERM 61234.0\n"
    queued = (job / "scontrol").read_text() if (job / "scontrol").exists() else ""
    assert queued == ("requeue 61234\n" if after_term else "")
