"""What a stage imports, since its start is most of what a short one takes, and how a process ends."""

import signal
import subprocess
import sys
from pathlib import Path

from tests.cli.command import ENVIRONMENT, ROOT

_CODE = """
import sys
from moetrain.cli.main import main
assert main(sys.argv[1:]) == 0
late = {"torch._dynamo", "torch._inductor", "sympy", "transformers", "datasets"} & sys.modules.keys()
assert not late, f"{late} were imported: seconds of every start"
"""


def test_training_imports_no_compiler_and_no_library_that_it_does_not_use(tmp_path: Path) -> None:
    words = ["pretrain", "model=k2_nano_test", "data=test", "train.steps=1", f"run.folder={tmp_path}", "run.name=a"]
    done = subprocess.run(
        [sys.executable, "-c", _CODE, *words], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stderr


ABORTS_LATE = """
import atexit, os, pathlib

class Aborts:
    def __del__(self):  # when the interpreter is taken apart
        os.abort()

kept = Aborts()
atexit.register(pathlib.Path("exit_functions_ran").touch)
"""


def test_a_rank_ends_with_its_exit_code_whatever_happens_when_the_interpreter_is_taken_apart(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(ABORTS_LATE)
    command = [sys.executable, "-m", "moetrain.cli", "check", "pretrain", "model=k2_nano_test", "data=test"]
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577"}
    codes = {}
    for name, variables in (("alone", {}), ("rank", rank)):
        (tmp_path / name).mkdir()
        done = subprocess.run(
            [*command, f"plugins=[{tmp_path}/late.py]"],
            cwd=tmp_path / name,
            env={**ENVIRONMENT, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert "ok  config" in done.stdout, done.stderr
        assert (tmp_path / name / "exit_functions_ran").exists()
        codes[name] = done.returncode
    assert codes == {"alone": -signal.SIGABRT, "rank": 0}


STOPPED_WHILE_LOADING = """
import sys

class Stops:
    def find_spec(self, name, path=None, target=None):
        if name == "hydra":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Stops())
from moetrain.cli.start import main
sys.exit(main())
"""


def test_ctrl_c_while_modules_are_loaded_is_one_line() -> None:
    command = [sys.executable, "-c", STOPPED_WHILE_LOADING]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (130, "moetrain: stopped\n", "")
