"""Parses the words of a command line into a command and its checked config."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moetrain.commands.schemas import SCHEMAS
from moetrain.compose import compose, load_config
from moetrain.config_keys import suggestion
from moetrain.errors import ConfigError


def split_command(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return (command, remaining words). Some commands have two words, such as `verify exports`."""
    commands = [*SCHEMAS, "check"]
    for length in (2, 1):
        if " ".join(words[:length]) in commands:
            return " ".join(words[:length]), list(words[length:])
    if begun := commands_of(words[0]):
        raise ConfigError(f"{words[0]} requires a second word: give one of {', '.join(begun)}")
    raise ConfigError(f"{words[0]!r} is not a command; {suggestion(words[0], commands)}")


def commands_of(word: str) -> list[str]:
    """Return the commands of two words of which `word` is the first."""
    return [command for command in SCHEMAS if command.startswith(f"{word} ")]


def composed(command: str, words: Sequence[str]) -> Any:
    """Return the checked config for a stage's words: overrides, or `--config FILE` with a config that a run wrote."""
    if words[:1] == ["--config"]:
        if len(words) != 2:
            raise ConfigError("--config takes one file and no overrides")
        return load_config(command, Path(words[1]))
    for word in words:
        if word.startswith("-"):
            raise ConfigError(f"{word}: unknown option; write key=value, or --config FILE directly after the command")
    return compose(command, [*words, *_implied(command, words)])


def _implied(command: str, words: Sequence[str]) -> list[str]:
    """Return what the words of a command line imply: a chat about a task acts in one."""
    keys = [word.partition("=")[0] for word in words]
    names_a_task = any(key == "task" or key.startswith("task.") for key in keys)
    return ["task_index=0"] if command == "chat" and names_a_task and "task_index" not in keys else []
