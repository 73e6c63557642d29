"""Reads `recipe.yaml` and composes its stages, each with its own checked config. Runs no stage.

    plugins: [my_task.py]            # optional; a path is relative to the recipe's folder
    processes: 2                     # optional; ranks of the stages that train or evaluate
    threads: 1                       # optional; run.threads of every stage
    stages:
      - name: pretrain
        command: pretrain
        overrides: [model=k2_nano, train.steps=300]
        processes: 1                 # optional, like `threads`: for this stage only
        seconds: 440                 # optional: expected time, for the time left until it has finished once
      - name: sft
        command: sft
        overrides: ["init_from=${stage:pretrain}"]

`${stage:NAME}` is the folder of an earlier stage. A stage that starts from its weights has the shape of its model.
A folder `configs/` beside recipe.yaml adds choices to config groups.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from moetrain.commands.recipe import RecipeRun
from moetrain.commands.schemas import SCHEMAS
from moetrain.commands.training import TrainingRun
from moetrain.commands.weights import EvalRun
from moetrain.compose import compose, data_folder, quoted, read_yaml
from moetrain.config_keys import suggestion
from moetrain.errors import ConfigError
from moetrain.files import user_path
from moetrain.run.chain import check_chain, shape_of

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_OVERRIDE = re.compile(r"(\+\+|\+|~)?([^.=]+)\.(.+)", re.DOTALL)
_OWN = {field.name for field in fields(RecipeRun)}
_COUNTS = ("processes", "threads")
_OF_RUN = ("run.folder", "run.name", "run.stage", "dry_run")
"""Keys of every stage that no override of a stage may change: the run would look for its results elsewhere."""
_OF_RANKS = (TrainingRun, EvalRun)
"""Configs of the stages that can run on several ranks."""


@dataclass(kw_only=True)
class RecipeStage:
    """One stage as it is written in the recipe."""

    name: str
    command: str
    overrides: list[str]
    processes: int | None
    threads: int | None
    seconds: int | None


@dataclass(kw_only=True)
class Recipe:
    """A checked recipe.yaml."""

    name: str
    folder: Path
    plugins: list[str]
    stages: list[RecipeStage]


@dataclass(kw_only=True)
class Stage:
    """A stage that is ready to run.

    config: checked root dataclass. composed: composes it again, with the shape that its weights have then. inputs:
    names of the earlier stages whose folders it uses. processes: number of ranks. seconds: time that the recipe states
    for it, on some machine.
    """

    name: str
    command: str
    config: Any
    composed: Callable[[], Any]
    inputs: list[str]
    processes: int
    seconds: int | None = None


def load(recipe: str) -> Recipe:
    """Return the recipe with this name or folder path. Raises `ConfigError`, which names the file and the mistake."""
    folder = user_path(recipe)
    own = data_folder("recipes") / recipe
    if (own / "recipe.yaml").is_file():
        folder = own
    path = folder / "recipe.yaml"
    if not path.is_file():
        names = sorted(path.parent.name for path in data_folder("recipes").glob("*/recipe.yaml"))
        raise ConfigError(f"recipe is {recipe!r}: no folder with a recipe.yaml; {suggestion(recipe, names)}")
    content = read_yaml(path)
    if not isinstance(content.get("stages"), list) or not content["stages"]:
        raise ConfigError(f"{path} has no list of stages: give stages: [...] (docs/commands.md)")
    _check_keys(content, ["plugins", *_COUNTS, "stages"], str(path))
    of_all = {key: _count(content, key, str(path)) for key in _COUNTS}
    stages: list[RecipeStage] = []
    for number, item in enumerate(content["stages"], start=1):
        earlier = [stage.name for stage in stages]
        stages.append(_stage(item, where=f"{path}, stage {number}", earlier=earlier, of_all=of_all))
    plugins = [_beside(folder, plugin) for plugin in _strings(content, "plugins", str(path))]
    return Recipe(name=folder.resolve().name, folder=folder, plugins=plugins, stages=stages)


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return (overrides of the run, overrides of stages). An override whose first name is no run field is a stage's."""
    own: list[str] = []
    of_stages: list[str] = []
    for word in words:
        match = _OVERRIDE.fullmatch(word)
        is_own = match is None or match.group(2) in _OWN
        (own if is_own else of_stages).append(word)
    return own, of_stages


def compose_stages(recipe: Recipe, run: RecipeRun, *, overrides: Sequence[str]) -> list[Stage]:
    """Compose and check all stages of a recipe. Raises `ConfigError`, which names the stage.

    overrides: overrides of stages, as `<stage>.<key>=<value>`.
    """
    names = [stage.name for stage in recipe.stages]
    extra: dict[str, list[str]] = {name: [] for name in names}
    for override in overrides:
        match = _OVERRIDE.fullmatch(override)
        assert match
        if match.group(2) not in extra:
            raise ConfigError(f"{override}: {match.group(2)!r} is no stage; {suggestion(match.group(2), names)}")
        extra[match.group(2)].append((match.group(1) or "") + match.group(3))
    stages: list[Stage] = []
    for stage in recipe.stages:
        of_run = _of_run(recipe, run, stage)
        _check_overrides(stage.name, stage.overrides, fixed={*_OF_RUN, *map(_key_of, of_run)})
        _check_overrides(stage.name, extra[stage.name], fixed={*_OF_RUN})
        words = [*stage.overrides, *of_run, *extra[stage.name]]
        stages.append(_compose_stage(recipe, stage, run=run, overrides=words, earlier=stages))
    check_chain([(stage.name, stage.config) for stage in stages])
    return stages


def _compose_stage(
    recipe: Recipe, stage: RecipeStage, *, run: RecipeRun, overrides: Sequence[str], earlier: Sequence[Stage]
) -> Stage:
    inputs: set[str] = set()
    names = [done.name for done in earlier]

    def folder_of(name: str) -> str:
        if name not in names:
            raise ConfigError(f"${{stage:{name}}} is no earlier stage; {suggestion(name, names)}")
        inputs.add(name)
        return str(Path(run.folder) / (run.name or recipe.name) / name)

    search = [recipe.folder / "configs"] if (recipe.folder / "configs").is_dir() else []
    before = [*earlier]

    def composed() -> Any:
        try:
            return compose(
                stage.command,
                overrides,
                stage_folder=folder_of,
                search=search,
                shape_of=lambda weights: shape_of(weights, [done.config for done in before]),
            )
        except ConfigError as error:
            raise ConfigError(f"stage {stage.name}: {error}") from None

    config = composed()
    processes = (run.num_processes or stage.processes or 1) if isinstance(config, _OF_RANKS) else 1
    return Stage(
        name=stage.name,
        command=stage.command,
        composed=composed,
        config=config,
        inputs=sorted(inputs),
        processes=processes,
        seconds=stage.seconds,
    )


def _check_overrides(name: str, overrides: Sequence[str], *, fixed: set[str]) -> None:
    """Raise ConfigError for an override of a key of `fixed`, or of a section with one: the run determines these."""
    for word in overrides:
        key = _key_of(word)
        if taken := sorted(other for other in fixed if other == key or other.startswith(f"{key}.")):
            own = taken[0].removeprefix("run.")
            cure = "its folder has the name of the stage" if own == "stage" else f"give {own}=... to the whole run"
            raise ConfigError(f"stage {name}: {word}: a stage of a recipe cannot set {taken[0]}; {cure}")


def _key_of(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def _of_run(recipe: Recipe, run: RecipeRun, stage: RecipeStage) -> list[str]:
    """Return the settings of the run that apply to a stage, as overrides of the stage."""
    plugins = [*recipe.plugins, *run.plugins]
    threads = run.threads or stage.threads
    return [
        f"run.folder={quoted(run.folder)}",
        f"run.name={quoted(run.name or recipe.name)}",
        f"run.stage={stage.name}",
        f"run.seed={run.seed}",
        *([f"run.threads={threads}"] if threads else []),
        f"run.wandb.project={quoted(run.wandb.project)}",
        f"run.wandb.mode={run.wandb.mode}",
        *([f"plugins=[{','.join(map(quoted, plugins))}]"] if plugins else []),
    ]


def _stage(item: Any, *, where: str, earlier: Sequence[str], of_all: Mapping[str, int | None]) -> RecipeStage:
    if not isinstance(item, dict):
        raise ConfigError(f"{where} is {item!r}: give name, command and overrides")
    _check_keys(item, ["name", "command", "overrides", *_COUNTS, "seconds"], where)
    command = item.get("command")
    name = item.get("name", command)
    commands = [command for command in SCHEMAS if command not in ("run", "data", "generate", "chat", "serve")]
    if command not in commands:
        raise ConfigError(f"{where}: command is {command!r}; {suggestion(str(command), commands)}")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in _OWN or name in earlier:
        raise ConfigError(f"{where}: name is {name!r}; give a new one of small letters, digits and _")
    counts = {key: _count(item, key, where) or of_all[key] for key in _COUNTS}
    overrides, seconds = _strings(item, "overrides", where), _count(item, "seconds", where)
    return RecipeStage(name=name, command=command, overrides=overrides, seconds=seconds, **counts)


def _count(content: dict[Any, Any], key: str, where: str) -> int | None:
    value = content.get(key)
    if value is not None and (type(value) is not int or value < 1):  # bool is a subclass of int
        raise ConfigError(f"{where}: {key} is {value!r}: give a whole number of at least 1")
    return value


def _check_keys(content: dict[Any, Any], keys: Sequence[str], where: str) -> None:
    for key in content:
        if key not in keys:
            raise ConfigError(f"{where}: there is no key {key!r}; {suggestion(str(key), keys)}")


def _strings(content: dict[str, Any], key: str, where: str) -> list[str]:
    value = content.get(key) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{where}: {key} is {value!r}: give a list of strings, such as [train.steps=10]")
    return list(value)


def _beside(folder: Path, plugin: str) -> str:
    """Resolve the path of a .py plugin relative to the recipe's folder. A module name is returned unchanged."""
    return str((folder / plugin).resolve()) if plugin.endswith(".py") else plugin
