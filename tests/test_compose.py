"""From YAML and a command line to a checked dataclass; what is wrong becomes one line that names the key."""

from pathlib import Path
from typing import Any

import pytest

from moetrain.commands.schemas import SCHEMAS
from moetrain.commands.training import PretrainRun, TrainingRun
from moetrain.compose import compose, load_config, quoted, save_config, to_mapping
from moetrain.data.config import Overlong, SourceKind
from moetrain.errors import ConfigError


def test_overrides_arrive_typed() -> None:
    run = compose("pretrain", ["train.steps=7", "data.overlong=drop", "model.q_lora_rank=null", "plugins=[a,b]"])
    assert isinstance(run, PretrainRun)
    assert run.train.steps == 7
    assert run.data.overlong is Overlong.drop
    assert run.model.q_lora_rank is None
    assert run.plugins == ["a", "b"]


def test_a_choice_of_a_group_changes_what_it_says_and_nothing_else() -> None:
    run = compose("pretrain", ["model=kimi_k2_thinking"])
    assert run.model.num_experts == 384
    assert run.model.num_layers == 61
    assert run.model.yarn.factor == 64.0
    assert run.data.tokenizer.vocab_size is None  # as many as model.vocab_size


def test_a_new_source_needs_no_special_syntax() -> None:
    run = compose("pretrain", ["data.sources.mine.kind=jsonl", "data.sources.mine.path=x.jsonl"])
    assert run.data.sources["mine"].kind is SourceKind.jsonl
    assert run.data.sources["mine"].path == "x.jsonl"
    assert "code" in run.data.sources


def test_sources_and_options_can_be_given_as_one_value() -> None:
    words = ["data=none", "data.sources={a:{kind:text,path:x},b:{kind:maths}}", "task.name=own", "task.options={n:3}"]
    given: PretrainRun = compose("pretrain", words)
    assert {name: source.kind for name, source in given.data.sources.items()} == {"a": "text", "b": "maths"}
    assert given.task.options == {"n": 3}


def test_a_source_can_be_removed() -> None:
    assert "maths" not in compose("pretrain", ["~data.sources.maths"]).data.sources


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stesp=3"], "train.stesp: there is no 'stesp' in train; did you mean steps?"),
        (["steps=3"], "steps: there is no 'steps' in this command; did you mean train.steps?"),
        (["modle=k2_nano"], "modle: there is no 'modle' in this command; did you mean model?"),
        (["model=k2_nan"], "model is 'k2_nan': did you mean k2_nano?"),
        (["data.overlong=splitt"], "data.overlong is 'splitt': did you mean split?"),
        (
            ["data.sources.code.kin=x"],
            "data.sources.code.kin: there is no 'kin' in data.sources.code; did you mean kind?",
        ),
        (
            ["+data.sources.code.kin=x"],
            "data.sources.code.kin: there is no 'kin' in data.sources.code; did you mean kind?",
        ),
        (["train.steps=many"], "train.steps: Value 'many' of type 'str' could not be converted to Integer"),
        (["train.steps=0"], "train.steps is 0: give at least 1"),
        (["train.steps.x=3"], "train.steps.x: train.steps is one value and has no 'x'"),
        (["train.steps"], "train.steps: not of the form key=value"),
        (
            ["train.steps=5)"],
            "train.steps=5): not of the form key=value; a value is a number, a word, a 'quoted text' or a [list]",
        ),
        (["init_from=\udcff"], "init_from is '\\udcff': this is not UTF-8"),
        (
            ["hydra.run.dir=foo"],
            "hydra.run.dir=foo: of Hydra's own keys only hydra.searchpath can be set; remove this override",
        ),
        (["~train"], "~train: only an entry such as data.sources.maths can be removed; give train a value"),
        (["init_from=${stage:sft}"], "${stage:sft} is only valid in a recipe"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose("pretrain", overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_choice_in_a_list_is_named_with_its_value() -> None:
    with pytest.raises(ConfigError, match=r"^export.consumers\[0\] is 'foo': there are llama_cpp, moetrain, transf"):
        compose("export", ["export.consumers=[foo]"])


def test_a_mistake_in_a_yaml_names_the_key_or_the_line(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "odd.yaml").write_text("num_layerz: 3\n")
    (folder / "bytes.yaml").write_bytes(b"num_layers: \xff\n")
    (folder / "torn.yaml").write_text("num_layers: [3\n")
    with pytest.raises(ConfigError, match=r"model\.num_layerz: there is no 'num_layerz' in model; did you mean num_l"):
        compose("pretrain", ["model=odd"], search=[tmp_path])
    with pytest.raises(ConfigError, match=r"is not YAML"):
        compose("pretrain", ["model=bytes"], search=[tmp_path])
    with pytest.raises(ConfigError, match=r"torn\.yaml:2 is not YAML"):
        compose("pretrain", ["model=torn"], search=[tmp_path])


TEXTS = [
    "a 'b' \"c\"\\ d=[e], {f}",
    "Hello, world! (1 + 2) = 3; $5, ${HOME} ${a.b} ${ \\${x} 100% #1",
    "line\none\n\\\n",
    "Привет, мир: что это? 你好,世界 😀",
    "it's",
    "'one' and 'two'",
    "C:\\new\\",
    "null and void",
    "a=b",
    "~+x",
    "1e5",
    " ",
    "[",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("key", ["init_from", "run.wandb.project", "data.sources.mine.path"])
def test_text_is_taken_as_it_is_typed_and_survives_the_config_file(key: str, text: str, tmp_path: Path) -> None:
    new = ["data.sources.mine.kind=jsonl"] if "mine" in key else []
    for value in (text, quoted(text)):
        run = compose("pretrain", [*new, f"{key}={value}"])
        found = {
            "init_from": run.init_from,
            "run.wandb.project": run.run.wandb.project,
            "data.sources.mine.path": run.data.sources["mine"].path if new else None,
        }
        assert found[key] == text
        save_config(run, tmp_path / "config.yaml")
        assert load_config("pretrain", tmp_path / "config.yaml") == run


def test_a_value_that_is_one_quoted_string_stands_for_what_is_inside() -> None:
    assert compose("pretrain", ["init_from='a \\'b\\' \"c\"'"]).init_from == "a 'b' \"c\""
    assert compose("pretrain", ['init_from="it\'s"']).init_from == "it's"
    assert compose("pretrain", ["init_from=null"]).init_from is None
    assert compose("pretrain", ["init_from='null'"]).init_from == "null"
    assert compose("generate", ["prompt=null"]).prompt == "null"


def test_stage_becomes_a_folder_in_a_recipe() -> None:
    run = compose("pretrain", ["init_from=${stage:before}/x"], stage_folder=lambda name: f"runs/{name}")
    assert run.init_from == "runs/before/x"
    run = compose("pretrain", ["init_from=${stage:a}, ${b} and ${stage:c}"], stage_folder=lambda name: f"<{name}>")
    assert run.init_from == "<a>, ${b} and <c>"


@pytest.mark.parametrize("command", SCHEMAS)
def test_a_saved_config_is_read_back_equal(command: str, tmp_path: Path) -> None:
    run = compose(command, [])
    save_config(run, tmp_path / "config.yaml")
    assert load_config(command, tmp_path / "config.yaml") == run
    assert to_mapping(run)


def test_a_saved_config_is_checked_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("train:\n  stesp: 3\n")
    with pytest.raises(ConfigError, match=r"config\.yaml.*there is no 'stesp' in train; did you mean steps\?"):
        load_config("pretrain", path)
    for content, message in [
        (b"run: \xff", r"config\.yaml is not YAML: .*UTF-8 text"),
        (b"run: \x07", r"config\.yaml is not YAML: special characters are not allowed at position 5"),
        (b"run: [", r"config\.yaml:1 is not YAML"),
        (b"- run", r"config\.yaml contains a value of type list: give keys and values"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=message) as caught:
            load_config("pretrain", path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="there is no config file"):
        load_config("pretrain", tmp_path / "none.yaml")


def test_settings_of_a_family_of_a_plugin_are_given_under_its_name() -> None:
    words = ["plugins=[chase.py]", "task.name=chase", "task.chase.max_calls=7", "task.options.min_calls=2"]
    assert compose("eval", words).task.options == {"max_calls": 7, "min_calls": 2}
    with pytest.raises(ConfigError, match=r"task\.other\.max_calls: there is no 'other' in task"):
        compose("eval", ["task.name=chase", "task.other.max_calls=7"])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("[a.py,b.py]", ["a.py", "b.py"]),
        ("[a.py, b.py ]", ["a.py", "b.py"]),
        ("['a,b.py',\"c d.py\"]", ["a,b.py", "c d.py"]),
        ("[你好.py]", ["你好.py"]),
        ("[a(1).py,it's.py]", ["a(1).py", "it's.py"]),
        ("[x=1,${y},#2]", ["x=1", "${y}", "#2"]),
        ("[]", []),
    ],
)
def test_items_of_a_list_of_text_are_text(value: str, expected: list[str]) -> None:
    run: TrainingRun = compose("pretrain", [f"plugins={value}"])
    assert run.plugins == expected


def test_options_of_plugins_are_given_as_people_type_them() -> None:
    words = [
        "task.options.a=it's",
        "task.options.b=你好",
        "task.options.c=3",
        "task.options.d=[1,2]",
        "task.options.e=x y",
    ]
    run: Any = compose("rl", words)
    assert run.task.options == {"a": "it's", "b": "你好", "c": 3, "d": [1, 2], "e": "x y"}


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("verify endpoint", ["url=http://a/v1", "other=http://b/v1", "requests=rows.jsonl"]),
        ("bench serve", ["url=http://a/v1"]),
        ("verify faults", []),
    ],
)
def test_a_text_whose_key_is_also_a_config_group_is_taken_as_text(command: str, words: list[str]) -> None:
    for name in ("k2_nano", "my model, v2", "models/a=b"):
        assert compose(command, [*words, f"model={name}"]).model == name
    assert compose(command, words).model in (None, "k2_nano_test")
