"""`verify gpu`, as far as a CPU can show: the comparisons, the limits on time, the files, the refusal."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moetrain.cli.command_line import composed, split_command
from moetrain.commands.verify import GpuPart, VerifyGpuRun
from moetrain.errors import BoundError
from moetrain.verify.gpu import COMMANDS, run_limited, verify_gpu
from moetrain.verify.gpu_models import decode_rows, training_rows
from moetrain.verify.gpu_operations import flash_rows, grouped_rows
from moetrain.verify.table import check_rows
from tests.cli.command import ENVIRONMENT, ROOT
from tests.ops.test_flash_attention import by_run

CPU = torch.device("cpu")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


def later_too(q_PHQ, k_PHQ, v_PHQ, bounds_q, bounds_k, longest_q, longest_k, *, scale, window_size):
    """Return attention that also reads the tokens of other documents."""
    one = torch.tensor([0, len(q_PHQ)], dtype=torch.int32)
    return by_run(q_PHQ, k_PHQ, v_PHQ, one, one, len(q_PHQ), len(q_PHQ), scale=scale, window_size=window_size)


def test_the_comparisons_hold_for_a_cpu_beside_itself() -> None:
    rows = [*flash_rows(CPU, kernel=by_run), *grouped_rows(CPU), *training_rows(CPU), *decode_rows(CPU)]
    assert len(rows) == 6 + 6 + 4 + 6
    check_rows(rows)
    exact = [row.value for row in rows if "float32" in row.name]
    assert exact == [0.0] * 4, "a CPU repeats every bit"
    assert all(row.value > 0 for row in rows if "float32" not in row.name), "bfloat16 was compared with more digits"


def test_attention_over_other_documents_misses_its_bound() -> None:
    with pytest.raises(BoundError, match=r"widths 64 and 64, output: .* is above the bound 0\.0078125"):
        check_rows(list(flash_rows(CPU, kernel=later_too)))


@without_gpu
def test_a_part_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    """Without a GPU, the flash kernel fails, and grouped products are computed by the CPU."""
    run = VerifyGpuRun(parts=[GpuPart.flash_attention, GpuPart.grouped_products])
    failed, *others = verify_gpu(run, folder=tmp_path)
    assert failed.name == "flash_attention: failed" and not failed.is_kept
    assert failed.note.startswith("exit code 1: ") and (tmp_path / "flash_attention.log").read_text()
    assert len(others) == 6 and all(row.is_kept for row in others)
    stored = json.loads((tmp_path / "grouped_products.json").read_text())["rows"]
    assert [f"grouped_products: {row['name']}" for row in stored] == [row.name for row in others]
    assert {path.name for path in tmp_path.iterdir()} == {
        *("flash_attention.log", "grouped_products.log", "grouped_products.json")
    }


def test_a_part_without_time_fails_and_no_earlier_result_is_taken_for_its_own(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text('{"rows": []}')
    run = VerifyGpuRun(parts=[GpuPart.training, GpuPart.decode], total_seconds=1)
    ended, never = verify_gpu(run, folder=tmp_path)
    assert ended.note.startswith("took longer than 1 s") and not ended.is_kept
    assert never.note == "did not start: 1 s (total_seconds) were over" and not never.is_kept
    assert not (tmp_path / "training.json").exists()


def test_a_process_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    child = f"import time, pathlib\nwhile True:\n    pathlib.Path({str(alive)!r}).touch()\n    time.sleep(0.02)"
    code = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(60)"
    ended = run_limited([sys.executable, "-c", code], log=tmp_path / "log", seconds=1.5)
    assert ended.problem == "took longer than 2 s" and ended.seconds < 30
    alive.unlink()
    time.sleep(0.3)
    assert not alive.exists()


@pytest.mark.parametrize("part", list(COMMANDS))
def test_the_commands_of_the_parts_are_valid_and_need_one_gpu_and_no_peer(part: GpuPart) -> None:
    command, words = split_command(COMMANDS[part])
    config = composed(command, words)
    assert config.num_processes == 1 if part is GpuPart.recipe else (config.peers == [] and command.startswith("bench"))


def test_a_process_that_fails_is_reported_by_its_last_line(tmp_path: Path) -> None:
    code = "import sys\nprint('first')\nsys.exit('the reason')"
    ended = run_limited([sys.executable, "-c", code], log=tmp_path / "log", seconds=30)
    assert ended.problem == "exit code 1: the reason"
    assert run_limited(["true"], log=tmp_path / "log", seconds=30).problem is None


@without_gpu
def test_the_script_says_in_one_line_that_there_is_no_gpu(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "launch/gpu_check.sh")]
    environment = {**ENVIRONMENT, "VENV": sys.prefix}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("moetrain: verify gpu requires a GPU, and torch ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
