"""Checks that span sections, and that every field tells what it is."""

from dataclasses import replace
from pathlib import Path

import pytest

from moetrain.cli.help_page import field_docs
from moetrain.commands.schemas import SCHEMAS
from moetrain.commands.stage import RunConfig
from moetrain.commands.training import PretrainRun, RlRun
from moetrain.compose import compose, load_config, save_config, to_mapping
from moetrain.config_keys import leaf_keys
from moetrain.data.config import DataConfig, SourceConfig, TokenizerConfig
from moetrain.errors import ConfigError
from moetrain.model.config import ModelConfig
from moetrain.parallel.config import EngineName, ParallelConfig
from moetrain.quant.config import QuantConfig
from moetrain.rollout.config import RolloutConfig
from moetrain.run.record import changes, record_of
from moetrain.run.stage import check_folder


def data(**values: object) -> DataConfig:
    return DataConfig(sources={"code": SourceConfig()}, **values)  # type: ignore[arg-type]


def test_expert_parallelism_has_to_divide_the_experts() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.expert is 3: it must divide model\.num_experts=8"):
        PretrainRun(data=data(), parallel=ParallelConfig(expert=3))


def test_the_plain_engine_is_one_process() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.expert is 2: parallel.engine=torch runs in one process; give 1"):
        PretrainRun(data=data(), parallel=ParallelConfig(expert=2, engine=EngineName.torch))


def test_groups_of_the_grid_have_to_divide_the_widths_when_they_are_used() -> None:
    with pytest.raises(ConfigError, match=r"quant\.group_size is 24: it must divide model\.hidden_size=128"):
        PretrainRun(data=data(), quant=QuantConfig(enabled=True, group_size=24))
    assert PretrainRun(data=data(), quant=QuantConfig(group_size=24)).quant.group_size == 24


def test_sequences_have_to_fit_the_positions() -> None:
    with pytest.raises(ConfigError, match=r"data\.seq_len is 2048: give at most model\.max_position_embeddings=1024"):
        PretrainRun(model=ModelConfig(max_position_embeddings=1024), data=data(seq_len=2048))
    with pytest.raises(ConfigError, match=r"rollout\.max_tokens is 896: give at most"):
        RlRun(model=ModelConfig(max_position_embeddings=512), rollout=RolloutConfig(max_tokens=896))


def test_a_model_has_at_least_as_many_rows_as_its_tokenizer_has_tokens() -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.vocab_size is 2048 and model\.vocab_size is 1024: "):
        PretrainRun(data=data(tokenizer=TokenizerConfig(vocab_size=2048)))
    assert PretrainRun(data=data(tokenizer=TokenizerConfig(vocab_size=512))).model.vocab_size == 1024
    with pytest.raises(ConfigError, match=r"^model\.vocab_size is 100: a new tokenizer has at least 272"):
        PretrainRun(data=data(), model=ModelConfig(vocab_size=100))
    assert PretrainRun(
        data=data(tokenizer=TokenizerConfig(path="there")), model=ModelConfig(vocab_size=100)
    ).data.tokenizer.path


def test_without_weights_there_is_no_tokenizer_to_replace() -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.retrain is true and init_from is null"):
        PretrainRun(data=data(tokenizer=TokenizerConfig(retrain=True)))


def test_there_have_to_be_data() -> None:
    with pytest.raises(ConfigError, match=r"data\.sources has no source"):
        PretrainRun()


def test_names_of_folders_are_names() -> None:
    with pytest.raises(ConfigError, match=r"run\.name is 'a/b'"):
        RunConfig(name="a/b")
    assert str(RunConfig(folder="x", name="y", stage="z").path) == "x/y/z"


@pytest.mark.parametrize("command", SCHEMAS)
def test_every_field_of_every_command_has_a_docstring(command: str) -> None:
    from dataclasses import is_dataclass
    from typing import get_args, get_type_hints

    def silent(schema: type, prefix: str) -> list[str]:
        docs = field_docs(schema)
        names = [prefix + name for name, doc in docs.items() if not doc]
        for name, hint in get_type_hints(schema).items():
            for kind in (hint, *get_args(hint)):
                if is_dataclass(kind):
                    names += silent(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
        return names

    assert not silent(SCHEMAS[command], "")
    assert list(leaf_keys(SCHEMAS[command]))


@pytest.mark.parametrize(
    ("command", "word", "message"),
    [
        ("eval", "rollout.temperature=0.5", "give eval.temperatures"),
        ("eval", "data.tokenizer.path=mine", "the tokenizer is that of init_from"),
        ("eval", "data.tokenizer.vocab_size=300", "the tokenizer is that of init_from"),
        ("rl", "task.ledger.accounts=6", "task.ledger.accounts is given, and task.name is database"),
        ("sft", "task=marathon task.database.max_calls=3", "task.database.max_calls is given, and task.name is ledger"),
    ],
)
def test_a_setting_without_effect_is_refused(command: str, word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(command, word.split())


def test_configs_that_older_versions_wrote_are_read(tmp_path: Path) -> None:
    """They wrote `init_from: null` for every command, and `shrink_model: true` for prepared data."""
    run = compose("report", [f"run.folder={tmp_path}"])
    config = run.run.path / "config.yaml"
    save_config(run, config)
    config.write_text(config.read_text() + "init_from: null\n")
    assert load_config("report", config) == run
    check_folder(run)
    config.write_text(config.read_text().replace("init_from: null", "init_from: x"))
    with pytest.raises(ConfigError, match="is the folder of another command"):
        check_folder(run)
    prepared = compose("pretrain", ["data=none", "data.sources.own={kind:prepared,path:x}", f"run.folder={tmp_path}"])
    save_config(prepared, config)
    before = record_of(to_mapping(prepared), run_folder=tmp_path, inputs={})
    config.write_text(config.read_text().replace("shrink_model: false", "shrink_model: true"))
    assert load_config("pretrain", config) == prepared
    older = replace(before, config=before.config | {"data.tokenizer.shrink_model": True})
    assert changes(older, before, defaults=dict) == []


def test_a_command_that_reads_no_weights_takes_none(tmp_path: Path) -> None:
    for command in ("report", "bench decode", "verify layouts"):
        with pytest.raises(ConfigError, match="there is no 'init_from' in this command"):
            compose(command, [f"init_from={tmp_path}"])
    for command in ("bench balance", "bench optimizers"):
        with pytest.raises(ConfigError, match="leave it out, because the runs start from random weights"):
            compose(command, [f"init_from={tmp_path}"])
