"""What a stage imports: its start is most of what a short one takes."""

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
