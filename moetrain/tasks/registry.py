"""Task families by name. A plugin calls `register`; `build` is how stages get theirs."""

from collections.abc import Callable

from moetrain.errors import ConfigError
from moetrain.tasks.config import TaskConfig
from moetrain.tasks.database.family import DatabaseFamily
from moetrain.tasks.protocol import Demonstrates, TaskFamily

_FAMILIES: dict[str, Callable[[TaskConfig, int], TaskFamily]] = {"database": DatabaseFamily}


def register(name: str, factory: Callable[[TaskConfig, int], TaskFamily]) -> None:
    """Offer `factory(config, seed)` as the task family `name`."""
    _FAMILIES[name] = factory


def build(config: TaskConfig, seed: int) -> TaskFamily:
    """Return the task family that `config` names."""
    if config.name not in _FAMILIES:
        raise ConfigError(
            f"task.name is {config.name}: there are {', '.join(sorted(_FAMILIES))}; a plugin can register more"
        )
    return _FAMILIES[config.name](config, seed)


def demonstrator_of(family: TaskFamily) -> Demonstrates:
    """Return the family as one with demonstrations. Raises ConfigError when it has none."""
    if not isinstance(family, Demonstrates):
        raise ConfigError(
            f"data.sources has a source of kind dialogues, but {type(family).__name__} has no demonstrate(): "
            "take the source out, or add that method"
        )
    return family
