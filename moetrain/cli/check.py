"""`moetrain check`: composes and checks every config and recipe, or one command line with the files it
names. Runs nothing; needs torch only where a command line names weights."""

from collections.abc import Sequence
from typing import get_type_hints

from moetrain.cli.command_line import composed, split_command
from moetrain.commands import SCHEMAS
from moetrain.compose import compose, data_folder
from moetrain.config import TrainingRun
from moetrain.errors import ConfigError
from moetrain.run import recipe, runner
from moetrain.run.inputs import check_inputs, check_names, check_records, check_weights
from moetrain.run.resume_check import check_going_on
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
    command, rest = split_command(words)
    if command == "run":
        runner.prepare(rest)
    elif command != "check":
        config = composed(command, rest)
        check_inputs(config)
        check_folder(config)
        check_names(config)
        check_records(config)
        check_weights(config)
        if isinstance(config, TrainingRun):
            check_going_on(config)


def _check_choice(group: str, choice: str) -> None:
    """Compose a choice of a config group: one of the commands that have the group has to take it."""
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
