"""A stage's folder: whose config it keeps, and what is refused before anything is written."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest

from moetrain.commands.stage import StageRun
from moetrain.compose import compose, load_config
from moetrain.errors import CheckpointError, ConfigError
from moetrain.run.stage import check_folder, check_writable, has_results, stage_folder
from moetrain.stage_files import CONFIG, MADE_BY


def pretrain(folder: Path, *words: str) -> StageRun:
    run: StageRun = compose("pretrain", [f"run.folder={folder}", "run.name=x", "run.stage=pretrain", *words])
    return run


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """Return a stage's folder with a checkpoint."""
    with stage_folder(pretrain(tmp_path, "optim.lr=0.003")) as folder:
        (folder / "checkpoints" / "step_00000001").mkdir(parents=True)
    return folder


def test_a_refused_command_leaves_the_config_of_the_weights(trained: Path) -> None:
    before = (trained / CONFIG).read_text()
    run = pretrain(trained.parents[1], "optim.lr=0.5")
    with pytest.raises(CheckpointError), stage_folder(run):
        assert (trained / CONFIG).read_text() == before
        raise CheckpointError("was written by a run with another configuration")
    assert (trained / CONFIG).read_text() == before
    assert sorted(path.name for path in trained.iterdir()) == [".lock", "checkpoints", CONFIG, MADE_BY]


def test_a_run_that_goes_on_to_a_good_end_leaves_its_own_config(trained: Path) -> None:
    with stage_folder(pretrain(trained.parents[1], "train.log_every=7")):
        pass
    assert load_config("pretrain", trained / CONFIG).train.log_every == 7


def test_a_folder_of_another_command_is_refused(trained: Path) -> None:
    run = compose("export", [f"run.folder={trained.parents[1]}", "run.name=x", "run.stage=pretrain", "init_from=x"])
    with pytest.raises(
        ConfigError, match=r"x/pretrain is the folder of another command \(config\.yaml there has data, "
    ):
        check_folder(run)
    check_folder(pretrain(trained.parents[1]))
    (trained / CONFIG).write_text("run: [")
    check_folder(run)


def test_a_folder_that_cannot_be_written_is_named_before_it_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written: .*file is a file; give another folder or name"):
        check_folder(pretrain(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"n{20} cannot be written: File name too long; give"):
        check_writable(tmp_path / ("n" * 300))
    refused = pytest.raises(ConfigError, match=r"folder /proc/moetrain/x/pretrain cannot be written")
    with refused, stage_folder(pretrain(Path("/proc/moetrain"))):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_stage_says_what_made_it_and_a_refused_one_does_not_overwrite_it(trained: Path) -> None:
    made = json.loads((trained / MADE_BY).read_text())
    assert made["moetrain"] == version("moetrain") and made["cores"] > 0 and made["ranks"] == 1
    assert 0 < made["peak_memory_gib"] < made["memory_gib"]
    before = (trained / MADE_BY).read_bytes()
    with pytest.raises(CheckpointError), stage_folder(pretrain(trained.parents[1])):
        raise CheckpointError("was written by a run with another configuration")
    assert (trained / MADE_BY).read_bytes() == before


@pytest.mark.parametrize("name", ["finished_modes.json", "collection/0.jsonl", None])
def test_a_new_stage_that_fails_on_its_input_keeps_what_it_has_finished(name: str | None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError), stage_folder(pretrain(tmp_path)) as folder:
        if name is not None:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("{}")
        raise ConfigError("data.sources cannot be read")
    assert folder.exists() == (name is not None)


@pytest.mark.parametrize(
    ("name", "is_result"),
    [
        *(("done.json", True), ("bench.json", True), ("balance.json", True), ("optimizers.html", True)),
        *(("checkpoints/step_00000001", True), ("data/index.json", True), ("data/.work/00001.json", True)),
        *(("started.json", False), ("made_by.json", False), ("machine.json", False), ("metrics.jsonl", False)),
        *(("eval.json.previous", True), ("traces.previous/greedy.jsonl", True), ("traces.unfinished/a.jsonl", True)),
        *((".config.yaml.tmp", False), ("tokenizer/tokenizer.json", False), ("config.yaml", False)),
    ],
)
def test_a_folder_has_results_by_the_files_of_any_command(name: str, is_result: bool, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("{}")
    assert has_results(tmp_path) == is_result
