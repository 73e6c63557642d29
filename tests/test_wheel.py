"""An installed wheel has configs and recipes of its own."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_a_wheel_composes_every_config_and_trains_without_the_repository(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "installed")
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(tmp_path / 'installed')!r})\n"
        "import moetrain\n"
        f"assert {str(tmp_path)!r} in moetrain.__path__[0]\n"
        "from moetrain.cli.main import main\n"
        "sys.exit(main(['check']) or main(sys.argv[1:]))\n"
    )
    words = ["pretrain", "model=k2_nano_test", "data=test", "train.steps=1", "run.wandb.mode=disabled"]
    command = [sys.executable, "-I", "-c", code, *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ok  recipe=k2_nano:" in done.stdout
    assert "ok  model=kimi_k2_thinking" in done.stdout
    assert (tmp_path / "runs" / "default" / "pretrain" / "summary.json").is_file()
