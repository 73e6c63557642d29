"""The runner: a finished stage is skipped while nothing changed, a stopped one goes on, and a folder has one run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from moetrain.errors import ConfigError
from moetrain.log import read_metrics
from moetrain.run.stage import lock
from moetrain.run.torchrun import cause
from tests.cli.command import ENVIRONMENT, moetrain, moetrain_here

RECIPE = """
stages:
  - name: pretrain
    command: pretrain
    overrides:
      - model=k2_nano_test
      - data=test
      - "~data.sources.english"
      - "~data.sources.dialogues"
      - data.sources.maths.kind=maths
      - data.sources.maths.num_documents=100
      - train.steps=3
      - train.checkpoint_every=1
      - train.rows_per_step=2
      - train.rows_per_micro_batch=2
      - parallel.engine=torch
  - name: export
    command: export
    overrides: ["init_from=${stage:pretrain}"]
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a recipe that has run."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "mine").mkdir()
    (folder / "mine" / "recipe.yaml").write_text(RECIPE)
    done = moetrain("run", "recipe=mine", "wandb.mode=disabled", folder=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished run."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def statuses(words: list[str], folder: Path) -> dict[str, str]:
    """Run the recipe, and return the status of each stage as its table says."""
    done = moetrain_here("run", "recipe=mine", "wandb.mode=disabled", *words, folder=folder)
    assert done.returncode == 0, done.stderr
    cells = [line.split("│") for line in done.stdout.splitlines() if line.startswith("│")]
    return {row[1].strip(): row[2].strip() for row in cells}


def test_a_run_leaves_what_its_stages_promise(finished: Path) -> None:
    stage = finished / "runs" / "mine" / "pretrain"
    assert [row["step"] for row in read_metrics(stage / "metrics.jsonl") if "loss" in row] == [1, 2, 3]
    assert {"config.yaml", "summary.json", "done.json", "checkpoints", "tokenizer"} <= {p.name for p in stage.iterdir()}
    assert (finished / "runs" / "mine" / "export" / "model" / "config.json").is_file()


def flipped(path: Path) -> Path:
    """Flip a bit of the file's middle byte."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def test_weights_that_are_damaged_cost_no_stage_that_is_done(run: Path) -> None:
    copy = shutil.copytree(run / "runs" / "mine" / "pretrain", run / "copy")
    shards = sorted(copy.glob("checkpoints/step_00000003/*.safetensors"))
    flipped(shards[0])
    refused = moetrain_here("run", "recipe=mine", f"export.init_from={copy}/checkpoints/step_00000003", folder=run)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"moetrain: {shards[0]}: its sha256 is ") and refused.stderr.count("\n") == 1
    assert not (run / "runs" / "mine" / "export.previous").exists()
    assert statuses([], run) == {"pretrain": "unchanged", "export": "unchanged", "all": "this time"}


def test_another_tokenizer_beside_a_checkpoint_is_found(run: Path) -> None:
    stage = run / "runs" / "mine" / "pretrain"
    path = stage / "tokenizer" / "tokenizer.json"
    text = path.read_text()
    path.write_text(text.replace('"e": 68', '"e": 69'))
    assert path.read_text() != text
    refused = moetrain_here("check", "export", f"init_from={stage}", folder=run)
    assert refused.returncode == 2
    assert f"{path}: its sha256 is " in refused.stderr and refused.stderr.count("moetrain: ") == 1


def test_a_stage_in_which_another_process_works_is_neither_moved_nor_written(run: Path) -> None:
    stage = run / "runs" / "mine" / "pretrain"
    for words in (["again_from=pretrain"], ["on_change=rerun", "pretrain.train.log_every=7"]):
        before = {path: path.stat().st_mtime_ns for path in stage.rglob("*") if path.name != ".lock"}
        with lock(stage):
            refused = moetrain_here("run", "recipe=mine", "wandb.mode=disabled", *words, folder=run)
        assert refused.returncode == 2 and f"pretrain is in use by process {os.getpid()}" in refused.stderr
        assert {path: path.stat().st_mtime_ns for path in stage.rglob("*") if path.name != ".lock"} == before
        assert not list(stage.parent.glob("*.previous"))


def test_a_stage_that_was_started_by_hand_is_compared_by_its_config(run: Path) -> None:
    stage = run / "runs" / "mine" / "pretrain"
    (stage / "started.json").unlink()
    assert statuses([], run) == {"pretrain": "unchanged", "export": "unchanged", "all": "this time"}
    (stage / "done.json").unlink()
    text = (stage / "config.yaml").read_text()
    (stage / "config.yaml").write_text(by_hand := text.replace("steps: 3", "steps: 2"))
    assert by_hand != text
    refused = moetrain_here("run", "recipe=mine", "wandb.mode=disabled", folder=run)
    assert refused.returncode == 2
    assert "stage pretrain has begun with another configuration: train.steps: 2 -> 3" in refused.stderr
    assert (stage / "config.yaml").read_text() == by_hand and not (stage / "started.json").exists()


def test_a_stage_that_another_configuration_replaced_by_hand_is_not_unchanged(run: Path) -> None:
    stage = run / "runs" / "mine" / "export"
    by_hand = ["init_from=runs/mine/pretrain", "export.format=bf16", "run.name=mine", "run.stage=export"]
    assert moetrain_here("export", *by_hand, "run.wandb.mode=disabled", folder=run).returncode == 0
    refused = moetrain_here("run", "recipe=mine", "wandb.mode=disabled", folder=run)
    assert refused.returncode == 2 and "export.format: bf16 -> quantized" in refused.stderr
    records = [stage / "config.yaml", stage / "started.json"]
    for is_there in (True, False):
        for path in records:
            path.write_text("run: [") if is_there else path.unlink()
        refused = moetrain_here("run", "recipe=mine", "wandb.mode=disabled", folder=run)
        assert refused.returncode == 2 and "config.yaml and started.json are missing or damaged" in refused.stderr


@pytest.mark.parametrize("content", ["", '{"seconds": "x"}'])
def test_a_stage_whose_end_is_damaged_is_not_done(content: str, run: Path) -> None:
    stage = run / "runs" / "mine" / "export"
    (stage / "done.json").write_text(content)
    words = ["recipe=mine", "wandb.mode=disabled", "on_change=keep", "export.export.format=bf16"]
    refused = moetrain_here("run", *words, folder=run)
    assert refused.returncode == 2 and "stage export has begun with another configuration" in refused.stderr


def test_stages_after_one_that_runs_anew_are_not_unchanged(run: Path) -> None:
    shutil.rmtree(run / "runs" / "mine" / "pretrain")
    refused = moetrain_here("run", "recipe=mine", "wandb.mode=disabled", folder=run)
    assert refused.returncode == 2 and "its input stage pretrain runs again" in refused.stderr
    assert not (run / "runs" / "mine" / "pretrain").exists()


def weights_of(stage: Path) -> dict[str, bytes]:
    """Return what a stage's folder holds that took training to make."""
    return {path.name: path.read_bytes() for path in stage.rglob("*.safetensors")}


def test_a_changed_config_is_shown_and_refused_and_nothing_moves(run: Path) -> None:
    stage = run / "runs" / "mine" / "export"
    before = weights_of(stage)
    refused = moetrain_here("run", "recipe=mine", "wandb.mode=disabled", "export.export.format=bf16", folder=run)
    assert refused.returncode == 2
    assert "stage export is done with another configuration: export.format: quantized -> bf16." in refused.stderr
    assert "again_from=export" in refused.stderr and refused.stderr.count("\n") == 1
    assert weights_of(stage) == before
    assert not stage.with_name("export.previous").exists()
    assert statuses(["export.export.format=bf16", "on_change=keep"], run)["export"] == "unchanged"


def test_a_stopped_stage_keeps_its_config_whatever_is_asked_for(run: Path) -> None:
    stage = run / "runs" / "mine" / "pretrain"
    (stage / "done.json").unlink()  # as if it had been stopped after its last save
    before = {name: (stage / name).read_bytes() for name in ("config.yaml", "started.json")}
    words = ["run", "recipe=mine", "wandb.mode=disabled", "pretrain.train.steps=5", "on_change=keep"]
    refused = moetrain_here(*words, folder=run)
    assert refused.returncode == 2
    assert "stage pretrain has begun with another configuration: train.steps: 3 -> 5" in refused.stderr
    assert {name: (stage / name).read_bytes() for name in before} == before
    assert statuses([], run)["pretrain"] == "done"


def test_a_stopped_stage_resumes_with_what_changes_no_number(run: Path) -> None:
    stage = run / "runs" / "mine" / "pretrain"
    (stage / "done.json").unlink()
    words = ["train.log_every=2", "train.checkpoint_every=3", "train.rows_per_micro_batch=1", "run.threads=2"]
    words = [f"pretrain.{word}" for word in words]
    again = moetrain_here("run", "recipe=mine", "wandb.mode=disabled", *words, folder=run)
    assert again.returncode == 0, again.stderr
    assert "stage pretrain resumes with" in again.stderr and "train.log_every: 1 -> 2" in again.stderr
    assert not stage.with_name("pretrain.previous").exists()


def test_what_an_evaluation_has_finished_is_a_result(run: Path) -> None:
    stage = run / "runs" / "mine" / "export"
    for path in (*stage.glob("model/*"), stage / "done.json", stage / "summary.json"):
        path.unlink(missing_ok=True)
    (stage / "finished_modes.json").write_text("{}")
    refused = moetrain_here("run", "recipe=mine", "wandb.mode=disabled", "export.export.format=bf16", folder=run)
    assert refused.returncode == 2 and "stage export has begun with another configuration" in refused.stderr
    assert (stage / "finished_modes.json").is_file()


def test_a_changed_stage_runs_again_when_it_is_told_to_and_every_earlier_result_stays(run: Path) -> None:
    """Three times over: what lies in .previous is never replaced."""
    stage = run / "runs" / "mine" / "export"
    seen = [weights_of(stage)]
    for format_name in ("bf16", "quantized", "bf16"):
        again = statuses([f"export.export.format={format_name}", "on_change=rerun"], run)
        assert again == {"pretrain": "unchanged", "export": "done", "all": "this time"}
        seen.append(weights_of(stage))
    names = ["export.previous", "export.previous.2", "export.previous.3", "export"]
    assert [weights_of(stage.with_name(name)) for name in names] == seen


def test_neither_times_nor_code_run_a_finished_stage_again(run: Path) -> None:
    """What a `git pull` or an upgrade changes: times of all files, and the version that made the stage."""
    for path in run.rglob("*"):
        os.utime(path)
    started = run / "runs" / "mine" / "pretrain" / "started.json"
    content = json.loads(started.read_text())
    started.write_text(json.dumps({**content, "made_by": "0.0.1 (source 000000000000)"}))
    done = moetrain_here("run", "recipe=mine", "wandb.mode=disabled", folder=run)
    assert done.returncode == 0
    assert "stage pretrain was made by moetrain 0.0.1 (source 000000000000), this is" in done.stderr
    assert statuses([], run) == {"pretrain": "unchanged", "export": "unchanged", "all": "this time"}


def test_a_folder_of_an_older_version_is_taken_as_it_is(run: Path) -> None:
    for name in ("pretrain", "export"):
        (run / "runs" / "mine" / name / "started.json").write_text('{"key": "abc"}')
    assert statuses([], run) == {"pretrain": "unchanged", "export": "unchanged", "all": "this time"}
    refused = moetrain_here("run", "recipe=mine", "wandb.mode=disabled", "pretrain.train.steps=4", folder=run)
    assert refused.returncode == 2
    assert "stage pretrain is done with another configuration: train.steps: 3 -> 4." in refused.stderr


def test_a_stage_that_takes_one_that_ran_again_is_named(run: Path) -> None:
    shutil.copytree(run / "runs" / "mine" / "export", run / "kept")
    assert statuses(["again_from=pretrain"], run) == {"pretrain": "done", "export": "done", "all": "this time"}
    shutil.rmtree(run / "runs" / "mine" / "export")
    shutil.copytree(run / "kept", run / "runs" / "mine" / "export")
    refused = moetrain_here("run", "recipe=mine", "wandb.mode=disabled", folder=run)
    assert refused.returncode == 2
    assert "its input stage pretrain was run again" in refused.stderr


def test_a_stage_that_is_refused_while_it_runs_leaves_the_results_before_it_in_place(run: Path) -> None:
    stage = run / "runs" / "mine" / "pretrain"
    before = weights_of(stage)
    words = ["again_from=pretrain", "pretrain.data.seq_len=8", "pretrain.data.overlong=drop"]
    refused = moetrain_here("run", "recipe=mine", "wandb.mode=disabled", *words, folder=run)
    assert refused.returncode == 2, refused.stderr
    assert weights_of(stage) == before
    assert not stage.with_name("pretrain.previous").exists()
    assert statuses([], run) == {"pretrain": "unchanged", "export": "unchanged", "all": "this time"}


def test_a_stage_begins_anew_when_it_is_told_to(run: Path) -> None:
    marker = run / "runs" / "mine" / "export" / "marker"
    marker.write_text("")
    assert statuses(["again_from=export"], run)["export"] == "done"
    assert not marker.exists()


def test_a_stage_killed_in_the_middle_goes_on_to_the_same_numbers(run: Path) -> None:
    stage = run / "runs" / "mine" / "pretrain"
    wanted = [(row["step"], row["loss"]) for row in read_metrics(stage / "metrics.jsonl") if "loss" in row]
    shutil.rmtree(stage)
    shutil.rmtree(stage.with_name("export"))
    command = [sys.executable, "-m", "moetrain.cli", "run", "recipe=mine", "wandb.mode=disabled"]
    runner = subprocess.Popen(command, cwd=run, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    while not list(stage.glob("checkpoints/step_*")) and runner.poll() is None:
        time.sleep(0.01)
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    assert not (stage / "done.json").exists()
    assert statuses([], run)["pretrain"] == "done"
    found = [(row["step"], row["loss"]) for row in read_metrics(stage / "metrics.jsonl") if "loss" in row]
    assert found == wanted


def test_ctrl_c_saves_and_the_same_command_resumes_to_the_same_numbers(run: Path) -> None:
    """A terminal sends it to the runner and the stage at the same time."""
    stage = run / "runs" / "mine" / "pretrain"
    wanted = [(row["step"], row["loss"]) for row in read_metrics(stage / "metrics.jsonl") if "loss" in row]
    shutil.rmtree(stage)
    shutil.rmtree(stage.with_name("export"))
    command = [sys.executable, "-m", "moetrain.cli", "run", "recipe=mine", "wandb.mode=disabled"]
    runner = subprocess.Popen(
        command, cwd=run, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    )
    assert runner.stderr is not None
    for line in runner.stderr:
        if b"metrics and checkpoints are in" in line:
            break
    os.killpg(runner.pid, signal.SIGINT)
    said = runner.stderr.read().decode()
    assert runner.wait() == 143, said
    assert "press Ctrl-C again" in said and "Traceback" not in said
    assert max(int(path.name[5:]) for path in (stage / "checkpoints").glob("step_*")) < len(wanted)
    assert statuses([], run)["pretrain"] == "done"
    found = [(row["step"], row["loss"]) for row in read_metrics(stage / "metrics.jsonl") if "loss" in row]
    assert found == wanted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_two_ranks_that_are_stopped_save_and_end_with_one_line(number: signal.Signals, run: Path) -> None:
    """A terminal sends Ctrl-C to all processes; a scheduler sends its signals to the first one."""
    name = f"stopped_{number.name}"
    words = ["recipe=mine", f"name={name}", "num_processes=2", "threads=1", "wandb.mode=disabled"]
    words += ["pretrain.train.steps=100000", "pretrain.parallel.engine=deepspeed"]
    command = [sys.executable, "-m", "moetrain.cli", "run", *words]
    checkpoints = run / "runs" / name / "pretrain" / "checkpoints"
    with (run / f"{name}.log").open("w") as log:
        runner = subprocess.Popen(
            command, cwd=run, env=ENVIRONMENT, stderr=log, stdout=subprocess.DEVNULL, start_new_session=True
        )
        while not list(checkpoints.glob("step_*")) and runner.poll() is None:  # both ranks train
            time.sleep(0.05)
        os.killpg(runner.pid, number) if number == signal.SIGINT else os.kill(runner.pid, number)
        code = runner.wait()
    said = (run / f"{name}.log").read_text()
    assert code == 143, said
    assert f"the ranks were stopped by {number.name}" in said and "Traceback" not in said


def test_stop_signals_that_come_again_and_again_do_not_disturb_the_launcher(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "stopped = []\n"
        "signal.signal(signal.SIGINT, lambda *_: stopped.append(1))\n"
        "pathlib.Path('rank' + os.environ['RANK']).touch()\n"
        "while not stopped: time.sleep(0.01)\n"
        "time.sleep(0.5)\n"
        "sys.exit(143)\n"
    )
    command = [sys.executable, "-m", "moetrain.run.torchrun", "--standalone", "--nproc-per-node", "2", "rank.py"]
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stderr=log)
        while len(list(tmp_path.glob("rank?"))) < 2:
            assert launcher.poll() is None
            time.sleep(0.02)
        while launcher.poll() is None:
            launcher.send_signal(signal.SIGINT)
            time.sleep(0.001)
    said = (tmp_path / "log").read_text()
    assert launcher.returncode == 143, said
    assert "the ranks were stopped by SIGINT" in said and "Traceback" not in said


def test_the_exit_code_of_ranks_that_refuse_their_input_is_passed_on(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "moetrain.run.torchrun", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "moetrain.cli", "pretrain", "train.stesp=3"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "ended with exit code 2" in done.stderr and "Traceback" not in done.stderr
    assert "signal 15" not in done.stderr


def test_a_time_to_save_that_is_no_number_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moetrain.run.torchrun", "x.py"],
        env={**ENVIRONMENT, "SAVE_SECONDS": "2 min"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (
        2,
        "moetrain: SAVE_SECONDS is '2 min': give a whole number of seconds\n",
    )


def test_a_rank_that_is_killed_is_named_and_its_signal_is_the_exit_code(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text("import os, time\ntime.sleep(30) if os.environ['RANK'] == '0' else os.kill(os.getpid(), 9)\n")
    launcher = [sys.executable, "-m", "moetrain.run.torchrun", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, str(script)], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 128 + signal.SIGKILL
    assert "rank 1 was killed by signal 9" in done.stderr and "signal 15" not in done.stderr


def test_the_cause_of_an_end_is_neither_a_lost_connection_nor_what_torch_ended() -> None:
    assert cause([1, -9]) == cause([-9, 1]) == cause([-15, -9, 143]) == -9
    assert cause([-15, 2]) == cause([143, 2, -15]) == 2
    assert cause([143, 143]) == 143


def test_a_stage_on_two_ranks_ends_with_the_run_that_started_it(run: Path) -> None:
    words = ["recipe=mine", "name=killed", "num_processes=2", "threads=1", "wandb.mode=disabled"]
    words += ["pretrain.train.steps=100000", "pretrain.parallel.engine=deepspeed"]
    command = [sys.executable, "-m", "moetrain.cli", "run", *words]
    runner = subprocess.Popen(command, cwd=run, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    stage = run / "runs" / "killed" / "pretrain"

    def alive() -> int:
        """Return how many processes of the stage there are: its ranks and their launcher."""
        found = 0
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has just ended
                is_of_stage = b"runs/killed/pretrain" in (process / "cmdline").read_bytes()
                found += is_of_stage and (process / "cwd").resolve() == run.resolve()
        return found

    try:
        while not list(stage.glob("checkpoints/step_*")):
            assert runner.poll() is None
            time.sleep(0.1)
        assert alive() == 3
    finally:
        runner.send_signal(signal.SIGKILL)
        runner.wait()
    deadline = time.monotonic() + 10
    while alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive() == 0


def test_an_error_of_a_stage_is_one_line_and_its_code(run: Path) -> None:
    checkpoint = max((run / "runs" / "mine" / "pretrain" / "checkpoints").iterdir())
    weights = min(checkpoint.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    done = moetrain("export", f"init_from={checkpoint}", "run.name=other", folder=run)
    assert done.returncode == 2
    assert done.stderr.startswith("moetrain: ") and done.stderr.count("\n") == 1
    assert str(weights) in done.stderr
    assert not (run / "runs" / "other" / "export" / "model").exists()


def test_a_folder_has_one_run_at_a_time(tmp_path: Path) -> None:
    with lock(tmp_path), pytest.raises(ConfigError, match=rf"is in use by process {os.getpid()}"), lock(tmp_path):
        pass
    with lock(tmp_path):
        assert (tmp_path / ".lock").is_file()


def test_a_dry_run_writes_nothing(finished: Path, tmp_path: Path) -> None:
    done = moetrain_here("run", f"recipe={finished / 'mine'}", "dry_run=true", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "parameters" in done.stdout and "memory per rank" in done.stdout
    assert list(tmp_path.iterdir()) == []
    assert json.loads((finished / "runs" / "mine" / "pretrain" / "summary.json").read_text())["steps"] == 3


def test_a_stage_continues_another_one_of_its_recipe_and_a_dry_run_counts_only_its_own_steps(run: Path) -> None:
    words = RECIPE.split("overrides:", 1)[1].split("  - name: export", 1)[0].replace("train.steps=3", "train.steps=5")
    stage = f"  - name: longer\n    command: pretrain\n    overrides:{words}"
    own = '      - "continue_from=${stage:pretrain}"\n      - train.continue_as=whole\n'
    (run / "mine" / "recipe.yaml").write_text(RECIPE + stage + own)
    before = weights_of(run / "runs" / "mine" / "pretrain")
    planned = moetrain_here("run", "recipe=mine", "dry_run=true", folder=run)
    assert planned.returncode == 0, planned.stderr
    found = statuses([], run)
    assert (found["pretrain"], found["longer"]) == ("unchanged", "done")
    first, longer = (run / "runs" / "mine" / name for name in ("pretrain", "longer"))
    steps = [[row["step"] for row in read_metrics(at / "metrics.jsonl") if "loss" in row] for at in (first, longer)]
    assert steps == [[1, 2, 3], [4, 5]]
    summary = json.loads((longer / "summary.json").read_text())
    assert (summary["steps"], summary["continued"]["steps"]) == (5, 3)
    assert weights_of(first) == before
    rows = [line.split("│") for line in planned.stdout.splitlines() if "tokens, at most" in line]
    of_first, of_longer = (int(row[2].replace(",", "")) for row in rows)
    assert of_longer * 3 == of_first * 2
