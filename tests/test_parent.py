"""A process whose parent has ended does not stay behind."""

import os
import signal
import subprocess
import sys

_CODE = "import sys; from moetrain.runtime import die_with_parent; die_with_parent(int(sys.argv[1])); print('goes on')"


def test_a_rank_whose_launcher_ended_before_it_could_watch_it_ends_at_once() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for launcher, code in ((os.getpid(), 0), (os.getppid(), 0), (ended.pid, -signal.SIGKILL)):
        done = subprocess.run([sys.executable, "-c", _CODE, str(launcher)], stdout=subprocess.PIPE, check=False)
        assert (done.returncode, done.stdout) == (code, b"" if code else b"goes on\n"), launcher
