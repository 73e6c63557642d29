"""From the words of a command line to a command and its checked config."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moetrain.commands import SCHEMAS
from moetrain.compose import compose, load_config, suggestion
from moetrain.errors import ConfigError


def split_command(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return (command, the words after it); `verify exports` is a command of two words."""
    commands = [*SCHEMAS, "check"]
    for length in (2, 1):
        if " ".join(words[:length]) in commands:
            return " ".join(words[:length]), list(words[length:])
    raise ConfigError(f"{words[0]!r} is not a command; {suggestion(words[0], commands)}")


def composed(command: str, words: Sequence[str]) -> Any:
    """Return the checked config of a stage's command line: overrides, or `--config FILE` with one that a run wrote."""
    if words[:1] == ["--config"]:
        if len(words) != 2:
            raise ConfigError("--config takes one file and no overrides")
        return load_config(command, Path(words[1]))
    for word in words:
        if word.startswith("-"):
            raise ConfigError(f"{word}: there is no such option here; write key=value, or --config FILE right after")
    return compose(command, words)
