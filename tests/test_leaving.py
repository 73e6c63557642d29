"""The end of a process does not wait for ever for what a plugin left behind."""

import subprocess
import sys
import time

import pytest

from tests.cli.command import ROOT

START = "import sys, threading, time, multiprocessing\nfrom moetrain import runtime\nruntime._LEAVE_S = 1.0\n"
THREAD = "threading.Thread(target=time.sleep, args=(100,), name='forgotten').start()\n"
POOL = (
    "from concurrent.futures import ThreadPoolExecutor\n"
    "pool = ThreadPoolExecutor(1, thread_name_prefix='forgotten')\npool.submit(time.sleep, 100)\n"
)
DAEMON_POOL = (
    "from concurrent.futures import ThreadPoolExecutor\n"
    "pool = ThreadPoolExecutor(1, thread_name_prefix='forgotten')\n"
    "starter = threading.Thread(target=pool.submit, args=(time.sleep, 100), daemon=True)\n"
    "starter.start()\nstarter.join()\n"
)
CHILD = "multiprocessing.get_context('fork').Process(target=time.sleep, args=(100,), name='forgotten').start()\n"


@pytest.mark.parametrize("left", ["", THREAD, POOL, DAEMON_POOL, CHILD])
def test_a_process_ends_with_its_exit_code_whatever_was_left_behind(left: str) -> None:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", f"{START}{left}print('result')\nruntime.leave(3)"],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (3, "result\n")
    assert done.stderr.startswith("moetrain: ends although these still run: forgotten" if left else "")
    assert bool(done.stderr) == bool(left)
    assert time.monotonic() - started < 30
