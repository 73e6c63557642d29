"""A corpus that cannot fill the vocabulary shrinks the model, in the later stages of a recipe too."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from moetrain.checkpoint.shape import stored_shape
from moetrain.cli.main import main
from moetrain.commands.training import DocumentRun
from moetrain.commands.weights import UpcycleRun
from moetrain.compose import compose
from moetrain.data.tokenizer import Tokenizer

ROWS = ["train.steps=2", "train.rows_per_step=2", "train.rows_per_micro_batch=2", "parallel.engine=torch"]


def reads(corpus: Path) -> list[str]:
    """Return the words of a short stage that reads a file of texts."""
    return ["data=none", f"data.sources={{mine:{{kind:jsonl,path:{corpus}}}}}", "data.seq_len=64", *ROWS]


def write_recipe(folder: Path, *words: str, corpus: Path) -> None:
    """Write a recipe that pretrains a dense model with further words, and trains and exports it with experts."""
    dense = ["model=k2_nano_test", "model.num_dense_layers=2", *words]
    sparse = ["model=k2_nano_test", "model.moe_intermediate_size=64"]
    stages = {
        "pretrain": [*dense, *reads(corpus)],
        "upcycle": [*sparse, "init_from=${stage:pretrain}"],
        "sft": ["init_from=${stage:upcycle}", *reads(corpus)],
        "export": ["init_from=${stage:sft}", "export.format=bf16"],
    }
    content = [{"name": name, "command": name, "overrides": overrides} for name, overrides in stages.items()]
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"stages": content}))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Return a file with texts that give fewer tokens than k2_nano_test has rows."""
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps({"text": f"{number % 10} to {number}"}) + "\n" for number in range(90)))
    return path


def run_recipe(folder: Path, *words: str) -> int:
    return main(["run", f"recipe={folder}", f"folder={folder}/runs", "name=few", "wandb.mode=disabled", *words])


def test_a_recipe_on_few_texts_shrinks_the_model_of_every_stage(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_recipe(tmp_path, corpus=corpus)
    assert run_recipe(tmp_path) == 0
    stages = tmp_path / "runs" / "few"
    num_tokens = Tokenizer.load(stages / "pretrain" / "tokenizer").vocab_size
    assert num_tokens < compose("pretrain", ["model=k2_nano_test"]).model.vocab_size
    for stage in ("pretrain", "upcycle", "sft", "export"):
        shape = stored_shape(str(stages / stage))
        assert shape is not None and shape.vocab_size == num_tokens, stage
    vocabulary = json.loads((stages / "pretrain" / "summary.json").read_text())["vocabulary"]
    assert vocabulary == {"tokens": num_tokens, "rows": num_tokens}

    capsys.readouterr()
    assert run_recipe(tmp_path) == 0
    assert capsys.readouterr().out.count("unchanged") == 4

    write_recipe(tmp_path, "model.vocab_size=384", corpus=corpus)
    assert run_recipe(tmp_path) == 2
    assert "stage pretrain is done with another configuration: " in (refused := capsys.readouterr().err)
    assert "data.tokenizer.shrink_model: true -> false" in refused and f"model.vocab_size: {num_tokens}" not in refused


def test_a_later_stage_that_names_the_model_has_the_rows_of_its_weights(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = {
        "pretrain": ["model=k2_nano_test", *reads(corpus)],
        "sft": ["model=k2_nano_test", "init_from=${stage:pretrain}", *reads(corpus)],
    }
    content = [{"name": name, "command": name, "overrides": overrides} for name, overrides in stages.items()]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"stages": content}))
    for _ in range(2):
        assert run_recipe(tmp_path) == 0
    assert capsys.readouterr().out.count("unchanged") == 2
    given = "sft.model.vocab_size=384"
    assert run_recipe(tmp_path, given) == 2
    assert run_recipe(tmp_path, "name=other", given) == 2  # in a new run too, when the rows are known
    assert "stage sft: model does not fit the weights" in capsys.readouterr().err


def test_a_stage_that_wrote_no_checkpoint_trains_its_tokenizer_again(tmp_path: Path, corpus: Path) -> None:
    words = ["pretrain", "model=k2_nano_test", f"run.folder={tmp_path}", "run.wandb.mode=disabled"]
    assert main([*words, *reads(corpus)]) == 0
    stage = tmp_path / "default" / "pretrain"
    few = Tokenizer.load(stage / "tokenizer").vocab_size
    for path in stage.iterdir():
        if path.name != "tokenizer":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    texts = [{"text": f"{number:x} words of {number * 7919:x}, and more"} for number in range(3000)]
    corpus.write_text("".join(json.dumps(text) + "\n" for text in texts))
    assert main([*words, *reads(corpus)]) == 0
    assert Tokenizer.load(stage / "tokenizer").vocab_size == 384 > few


def test_a_stopped_stage_resumes_with_the_rows_that_it_began_with(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["pretrain", "model=k2_nano_test", *reads(corpus), "train.kernels=torch"]
    words += [f"run.folder={tmp_path}", "run.wandb.mode=disabled"]
    folder = tmp_path / "default" / "pretrain"
    # Every row is kept, as versions did that could not shrink a model.
    assert main([*words, "data.tokenizer.shrink_model=false"]) == 0
    shape = stored_shape(str(folder))
    assert shape is not None and shape.vocab_size == 384 > Tokenizer.load(folder / "tokenizer").vocab_size
    assert main(words) == 0
    assert main(["check", *words]) == 0
    of_weights = ["sft", *words[2:], f"init_from={folder}", "data.tokenizer.shrink_model=true"]
    assert main(["check", *of_weights]) == 2
    assert "data.tokenizer.shrink_model is true, and the weights " in capsys.readouterr().err
    assert main([*words, "model.vocab_size=383"]) == 2
    for _ in range(2):  # the second time from a checkpoint of the smaller model
        assert main([*words, "run.name=small"]) == 0
    small = stored_shape(str(tmp_path / "small" / "pretrain"))
    assert small is not None and small.vocab_size == Tokenizer.load(folder / "tokenizer").vocab_size


@pytest.mark.parametrize(
    ("words", "shrinks"),
    [
        ([], True),
        (["model=k2_nano_test"], True),
        (["model.vocab_size=1024"], False),
        (["data.tokenizer.vocab_size=512"], False),
        (["data.tokenizer.path=x"], False),
        (["model.vocab_size=1024", "data.tokenizer.shrink_model=true"], True),
        (["data.tokenizer.shrink_model=false"], False),
        (["model={vocab_size:1024}"], False),
        (["data.sources.own={kind:prepared,path:x}"], False),
    ],
)
def test_a_model_shrinks_when_no_size_is_given(words: list[str], shrinks: bool) -> None:
    run: DocumentRun = compose("pretrain", words)
    assert run.data.tokenizer.shrink_model is shrinks


def test_an_upcycled_model_has_the_rows_of_its_dense_weights() -> None:
    dense = compose("pretrain", ["model.vocab_size=777"]).model
    run: UpcycleRun = compose("upcycle", ["init_from=dense"], shape_of=lambda weights: dense)
    assert run.model.vocab_size == 777
    given: UpcycleRun = compose("upcycle", ["init_from=dense", "model.vocab_size=800"], shape_of=lambda weights: dense)
    assert given.model.vocab_size == 800
