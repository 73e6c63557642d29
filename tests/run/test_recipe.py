"""Recipes: what may stand in recipe.yaml, and how overrides and folders reach the stages."""

from pathlib import Path

import pytest

from moetrain.compose import compose
from moetrain.errors import ConfigError
from moetrain.run import recipe

GOOD = """
plugins: [task.py, some.module]
stages:
  - name: first
    command: pretrain
    overrides: [model=tiny, train.steps=5]
  - command: sft
    overrides: ["init_from=${stage:first}"]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine" / "configs" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "configs" / "model" / "tiny.yaml").write_text("num_layers: 2\n")
    (tmp_path / "mine" / "task.py").write_text("")
    (tmp_path / "mine" / "recipe.yaml").write_text(GOOD)
    return tmp_path / "mine"


def stages(folder: Path, *, run: list[str], of_stages: list[str]) -> list[recipe.Stage]:
    return recipe.compose_stages(recipe.load(str(folder)), compose("run", run), overrides=of_stages)


def test_a_recipe_is_found_by_path_and_brings_its_own_config_groups(folder: Path) -> None:
    first, second = stages(folder, run=[], of_stages=[])
    assert (first.name, first.command) == ("first", "pretrain")
    assert (second.name, second.command) == ("sft", "sft")
    assert first.config.model.num_layers == 2
    assert first.config.train.steps == 5


def test_a_stage_takes_the_folder_of_an_earlier_one(folder: Path) -> None:
    first, second = stages(folder, run=["folder=/x", "name=y"], of_stages=[])
    assert second.config.init_from == "/x/y/first"
    assert second.inputs == ["first"]
    assert first.inputs == []
    assert str(first.config.run.path) == "/x/y/first"


@pytest.mark.parametrize("word", ["run.stage=other", "run.name=b", "run={folder: c}", "++run.folder=c", "dry_run=true"])
def test_what_would_lead_a_stage_elsewhere_is_refused(word: str, folder: Path) -> None:
    marks = word[: len(word) - len(word.lstrip("+"))]
    with pytest.raises(ConfigError, match=r"stage first: .*: a stage of a recipe cannot set (run\.\w+|dry_run); "):
        stages(folder, run=[], of_stages=[f"{marks}first.{word.lstrip('+')}"])
    (folder / "recipe.yaml").write_text(GOOD.replace("train.steps=5", f"'{word}'"))
    with pytest.raises(ConfigError, match=r"stage first: .*: a stage of a recipe cannot set"):
        stages(folder, run=[], of_stages=[])


@pytest.mark.parametrize(
    ("word", "cure"),
    [("run.seed=7", "seed="), ("run.wandb.project=mine", "wandb.project="), ("plugins=[other]", "plugins=")],
)
def test_what_the_run_sets_for_all_stages_is_refused_in_the_recipe(word: str, cure: str, folder: Path) -> None:
    (folder / "recipe.yaml").write_text(GOOD.replace("train.steps=5", f"'{word}'"))
    with pytest.raises(ConfigError, match=rf"stage first: .* give {cure}\.\.\. to the whole run"):
        stages(folder, run=[], of_stages=[])


def test_the_run_speaks_to_every_stage_and_overrides_to_one(folder: Path) -> None:
    first, second = stages(
        folder, run=["seed=3", "plugins=[other]", "wandb.mode=disabled"], of_stages=["first.train.steps=9"]
    )
    assert (first.config.run.seed, second.config.run.seed) == (3, 3)
    assert first.config.train.steps == 9
    assert second.config.train.steps != 9
    assert second.config.plugins == [str(folder / "task.py"), "some.module", "other"]
    assert second.config.run.wandb.mode == "disabled"


@pytest.mark.parametrize(("key", "own"), [("threads", "threads"), ("processes", "num_processes")])
def test_a_count_reaches_every_stage_a_stage_has_its_own_and_the_run_the_last_word(
    key: str, own: str, folder: Path
) -> None:
    def counts(run: list[str]) -> list[int | None]:
        made = stages(folder, run=run, of_stages=[])
        return [stage.config.run.threads if key == "threads" else stage.processes for stage in made]

    assert counts([]) == ([None, None] if key == "threads" else [1, 1])
    (folder / "recipe.yaml").write_text(f"{key}: 2\n" + GOOD)
    assert counts([]) == [2, 2]
    (folder / "recipe.yaml").write_text(
        f"{key}: 2\n" + GOOD.replace("  - command: sft", f"  - {key}: 3\n    command: sft")
    )
    assert counts([]) == [2, 3]
    assert counts([f"{own}=4"]) == [4, 4]


def test_only_stages_that_train_or_evaluate_have_several_ranks(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(
        "processes: 2\n" + GOOD + '  - {command: export, overrides: ["init_from=${stage:sft}"]}\n'
        '  - {command: eval, overrides: ["init_from=${stage:export}"]}\n'
    )
    assert [stage.processes for stage in stages(folder, run=[], of_stages=[])] == [2, 2, 1, 2]


def test_words_of_a_command_line_are_told_apart_by_their_first_name() -> None:
    own, of_stages = recipe.split_overrides(
        ["recipe=x", "wandb.mode=offline", "sft.model=y", "+sft.plugins=[a.b]", "dry_run=true"]
    )
    assert own == ["recipe=x", "wandb.mode=offline", "dry_run=true"]
    assert of_stages == ["sft.model=y", "+sft.plugins=[a.b]"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stages: [{name: a, command: pretrian}]", "stage 1: command is 'pretrian'; did you mean pretrain?"),
        ("stages: [{nam: a, command: pretrain}]", "stage 1: there is no key 'nam'; did you mean name?"),
        ("stages: [{name: A b, command: pretrain}]", "stage 1: name is 'A b'; give a new one"),
        ("stages: [{name: seed, command: pretrain}]", "stage 1: name is 'seed'; give a new one"),
        ("stages: [{command: pretrain}, {command: pretrain}]", "stage 2: name is 'pretrain'; give a new one"),
        ("stages: [{command: pretrain, overrides: a=b}]", "stage 1: overrides is 'a=b': give a list of strings"),
        ("{threads: 0, stages: [{command: pretrain}]}", "threads is 0: give a whole number of at least 1"),
        ("{processes: true, stages: [{command: pretrain}]}", "processes is True: give a whole number of at least 1"),
        (
            "stages: [{command: pretrain, processes: two}]",
            "stage 1: processes is 'two': give a whole number of at least 1",
        ),
        ("stages: [", "recipe.yaml:1 is not YAML"),
        ("stages: []", "recipe.yaml has no list of stages"),
        ("steps: []", "recipe.yaml has no list of stages"),
    ],
)
def test_a_mistake_in_a_recipe_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(ConfigError) as caught:
        recipe.load(str(tmp_path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"stages: \xff")
    with pytest.raises(ConfigError, match=r"recipe\.yaml is not YAML: .*UTF-8 text$"):
        recipe.load(str(tmp_path))


def test_the_first_stage_can_take_none(folder: Path) -> None:
    (folder / "recipe.yaml").write_text('stages: [{command: sft, overrides: ["init_from=${stage:pretrain}"]}]')
    with pytest.raises(ConfigError, match=r"stage sft: .*\$\{stage:pretrain\} is no earlier stage; there are none$"):
        stages(folder, run=[], of_stages=[])


def test_only_earlier_stages_can_be_taken(folder: Path) -> None:
    text = GOOD.replace("${stage:first}", "${stage:frist}")
    (folder / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"stage sft: .*\$\{stage:frist\} is no earlier stage; did you mean first\?"):
        stages(folder, run=[], of_stages=[])


def test_an_export_that_would_be_refused_is_named_before_the_first_stage_starts(folder: Path) -> None:
    text = GOOD + '  - {name: out, command: export, overrides: ["init_from=${stage:first}"]}\n'
    (folder / "recipe.yaml").write_text(text)
    assert len(stages(folder, run=[], of_stages=[])) == 3
    softmax = "first.model.score_function=softmax"
    with pytest.raises(ConfigError, match=r"stage out: export\.consumers names transformers.*=softmax"):
        stages(folder, run=[], of_stages=[softmax])
    assert len(stages(folder, run=[], of_stages=[softmax, "out.export.consumers=[moetrain]"])) == 3
    said = r"names llama_cpp, .*reads GGUF only.*: set export.consumers=\[moetrain, vllm\]"
    with pytest.raises(ConfigError, match=said):
        stages(folder, run=[], of_stages=[softmax, "out.export.consumers=[vllm,llama_cpp]"])
