"""`moetrain check`: composes and checks every config and recipe, or one command line with the files it names.

Prints an `ok` line for each check that passes. Runs no stage; loads torch only if the command line names weights.
"""

import os
from collections.abc import Sequence
from typing import get_type_hints

from moetrain.cli.command_line import composed, split_command
from moetrain.commands.schemas import SCHEMAS
from moetrain.commands.stage import WeightsRun
from moetrain.commands.training import TrainingRun
from moetrain.compose import compose, data_folder
from moetrain.errors import ConfigError
from moetrain.run import recipe, runner
from moetrain.run.inputs import check_inputs, check_names, check_prepared, check_records, check_weights
from moetrain.run.resume_check import check_resume
from moetrain.run.stage import check_folder


def main(words: Sequence[str]) -> int:
    """Check everything, or the command line `words`; return the exit code."""
    if words:
        _check_line(list(words))
        return 0
    for command in SCHEMAS:
        compose(command, [])
        print(f"ok  {command}")
    for group in sorted(path for path in data_folder("configs").iterdir() if path.is_dir()):
        for choice in sorted(group.glob("*.yaml")):
            _check_choice(group.name, choice.stem)
            print(f"ok  {group.name}={choice.stem}")
    for path in sorted(data_folder("recipes").glob("*/recipe.yaml")):
        stages = recipe.compose_stages(recipe.load(str(path.parent)), compose("run", []), overrides=[])
        print(f"ok  recipe={path.parent.name}: {', '.join(stage.name for stage in stages)}")
    return 0


def _check_line(words: list[str]) -> None:
    """Check one command line and print an `ok` line for each check that passes."""
    command, rest = split_command(words)
    if command == "check":
        raise ConfigError("check cannot check itself: give another command, such as: moetrain check sft train.steps=50")
    if command == "run":
        for stage in runner.prepare(rest).stages:
            print(f"ok  {stage.name}: config and inputs of `{stage.command}`")
        return
    config = composed(command, rest)
    print(f"ok  config: every key and value of `{command}`")
    check_inputs(config)
    print("ok  inputs: what the config names exists")
    check_folder(config)
    print(f"ok  folder: {config.run.path} can be written")
    check_names(config)
    print("ok  names: plugins, tasks and formats")
    check_records(config)
    print("ok  records: every document of the sources that are files")
    if "WORLD_SIZE" not in os.environ:  # launchers, which set it, start the same ranks again and again
        check_prepared(config)
        print("ok  tokens: every file of the sources that are prepared")
    check_weights(config)
    if isinstance(config, WeightsRun) and config.init_from is not None:
        print(f"ok  weights: {config.init_from} can be read and fits")
    if isinstance(config, TrainingRun):
        check_resume(config)
        print("ok  resume: nothing in the folder contradicts the config")


def _check_choice(group: str, choice: str) -> None:
    """Compose a choice of a config group; raise `ConfigError` unless at least one command accepts it."""
    refusal = ConfigError(f"configs/{group} is no section of any command")
    for command, schema in SCHEMAS.items():
        if group in get_type_hints(schema):
            try:
                compose(command, [f"{group}={choice}"])
            except ConfigError as error:
                refusal = ConfigError(f"{group}={choice}: {error}")
            else:
                return
    raise refusal
