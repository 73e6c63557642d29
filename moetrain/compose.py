"""Composes YAML files and the command line into a checked root dataclass. The only module that uses Hydra.

The root dataclass of a command is registered in Hydra's ConfigStore and is the first default of
`configs/<command>.yaml`. So every key has a type and a default, and unknown keys are refused during composition. Every
mistake becomes a one-line error that names the key. No other module sees Hydra or OmegaConf objects.

A stage that starts from weights takes its model's shape from them, unless `model=` selects one.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from moetrain.checkpoint.shape import FREE_FIELDS, mismatched_fields, stored_shape
from moetrain.commands.schemas import SCHEMAS
from moetrain.commands.training import DocumentRun, TrainingRun
from moetrain.commands.weights import UpcycleRun
from moetrain.config_keys import suggestion, types_along
from moetrain.data.config import SourceKind
from moetrain.errors import ConfigError
from moetrain.files import write_text
from moetrain.model.config import ModelConfig

_SEARCH_PATH = "hydra.searchpath"
_STAGE = re.compile(r"(\$\{stage:[^{}]*\})|(?:(?!\$\{stage:[^{}]*\}).)+", re.DOTALL)
"""Matches a `${stage:NAME}`, or the text up to the next one."""
_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'" + r'|"(?:[^"\\]|\\.)*"', re.DOTALL)
_MISSING = "???"
_Resolver = Callable[[str], str]
ShapeReader = Callable[[str], ModelConfig | None]
"""A function from the folder of weights to their shape; None if the shape is not known."""


def data_folder(name: str) -> Path:
    """Return the folder `configs` or `recipes`: in a checkout that of the repository, else that of the package."""
    package = Path(__file__).resolve().parent
    beside = package.parent / name
    return beside if (package.parent / "pyproject.toml").is_file() and beside.is_dir() else package / f"_{name}"


def compose(
    command: str,
    overrides: Sequence[str],
    *,
    stage_folder: _Resolver | None = None,
    search: Sequence[Path] = (),
    shape_of: ShapeReader = stored_shape,
) -> Any:
    """Return the checked root dataclass of `command`: its primary config with the overrides applied.

    stage_folder: returns the folder that replaces `${stage:<name>}` in a value. search: additional folders of config
    groups. shape_of: returns the shape of the weights that a training stage starts from. Raises a one-line
    `ConfigError` for any mistake, and `CheckpointError` if the shape of the weights cannot be read.
    """
    schema = SCHEMAS[command]
    name = command.replace(" ", "_")
    try:
        words = [_with_quoted_text(schema, _as_list(word)) for word in _with_family_options(schema, overrides)]
        parsed = OverridesParser.create().parse_overrides(words)
        direct, entries = _split(schema, parsed)
        ConfigStore.instance().store(name=f"{name}_schema", node=schema)
        OmegaConf.register_new_resolver("stage", stage_folder or _no_stages, replace=True)
        if search:
            urls = ",".join(f'"file://{path.resolve()}"' for path in search)
            direct.append(f"{_SEARCH_PATH}=[{urls}]")
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(data_folder("configs"))):
            tree = hydra.compose(name, overrides=direct)
        del ConfigStore.instance().repo[f"{name}_schema.yaml"]  # Hydra copies all schemas each time
        for key, value in entries:
            _set_entry(tree, schema, key=key, value=value)
        shape = _shape_of_weights(tree, schema, shape_of)
        is_size_given = any(map(_gives_size, parsed))
        _set_vocabulary(tree, schema, shape_of, is_size_given=is_size_given)
        if shape is not None and not any(override.key_or_group == "model" for override in parsed):
            _set_shape(tree, shape, given=[item for item in parsed if item.key_or_group.startswith("model.")])
        elif shape is not None and not is_size_given:
            tree.model.vocab_size = shape.vocab_size
        run: Any = OmegaConf.to_object(tree)
        if shape is not None:
            _check_shape(run, shape)
        return run
    except OverrideParseException as error:
        raise ConfigError(
            f"{error.override}: not of the form key=value; a value is a number, a word, a 'quoted text' or a [list]"
        ) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_in_one_line(error, schema)) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(_not_yaml(error, "a config file")) from None


def _with_family_options(schema: type, words: Sequence[str]) -> list[str]:
    """Replace `task.<name>.x=1` by `task.options.x=1` if `task.name` is the task family of a plugin."""
    names = [word.partition("=")[2] for word in words if word.startswith("task.name=")]
    if not names or "task" not in get_type_hints(schema) or names[-1] in get_type_hints(get_type_hints(schema)["task"]):
        return list(words)
    option_prefix = re.compile(rf"(\+\+|\+)?task\.{re.escape(names[-1])}\.(?=[^=]+=)")
    return [option_prefix.sub("task.options.", word) if option_prefix.match(word) else word for word in words]


def _shape_of_weights(tree: DictConfig, schema: type, shape_of: ShapeReader) -> ModelConfig | None:
    """Return the shape of the weights that a training stage starts from; None without weights."""
    if not issubclass(schema, TrainingRun):
        return None
    weights = tree.continue_from or tree.init_from
    return shape_of(weights) if weights else None


def _gives_size(override: Override) -> bool:
    """Return whether an override gives `model.vocab_size`, by its own key or in a mapping."""
    if override.key_or_group != "model":
        return override.key_or_group == "model.vocab_size"
    value = override.value()
    return isinstance(value, dict) and "vocab_size" in value


def _set_shape(tree: DictConfig, shape: ModelConfig, *, given: Sequence[Override]) -> None:
    """Replace the default model shape by that of the weights, then apply the overrides `given`."""
    tree.model = OmegaConf.structured(shape)
    for override in given:
        OmegaConf.update(tree, override.key_or_group, override.value())


def _set_vocabulary(tree: DictConfig, schema: type, shape_of: ShapeReader, *, is_size_given: bool) -> None:
    """Set what depends on whether `model.vocab_size` is given.

    If it is not, the sparse model of an upcycling has the rows of its dense weights, and a tokenizer that is trained
    from texts with too few pairs shrinks the model.
    """
    if schema is UpcycleRun and tree.init_from and not is_size_given:
        dense = shape_of(tree.init_from)
        tree.model.vocab_size = tree.model.vocab_size if dense is None else dense.vocab_size
    if issubclass(schema, DocumentRun) and tree.data.tokenizer.shrink_model is None:
        tokenizer = tree.data.tokenizer
        is_trained = not (tree.init_from or tree.continue_from or tokenizer.path or _has_prepared(tree))
        tokenizer.shrink_model = is_trained and tokenizer.vocab_size is None and not is_size_given


def _check_shape(run: TrainingRun, shape: ModelConfig) -> None:
    """Raise ConfigError if the config has another shape than its initial weights."""
    if mismatches := mismatched_fields(shape, run.model):
        field = "init_from" if run.continue_from is None else "continue_from"
        free = ", ".join(f"model.{name}{'*' if name.endswith('.') else ''}" for name in FREE_FIELDS)
        raise ConfigError(
            f"model does not fit the weights of {field}={run.continue_from or run.init_from} "
            f"({'; '.join(mismatches)}): leave model= and these fields out, because the shape comes from the weights; "
            f"only {free} may differ"
        )


def save_config(run: Any, path: Path) -> None:
    """Write all values of a checked config as YAML, in the form that `load_config` reads."""
    write_text(path, yaml.safe_dump(to_mapping(run), allow_unicode=True, sort_keys=False))


def load_config(command: str, path: Path) -> Any:
    """Return the checked root dataclass of `command` from a file that `save_config` wrote. `${` is not interpolated."""
    if not path.is_file():
        raise ConfigError(f"there is no config file {path}")
    schema = SCHEMAS[command]
    content = read_yaml(path)
    try:
        tree = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(_escaped(_known(content, schema))))
        assert isinstance(tree, DictConfig)
        if issubclass(schema, DocumentRun) and _has_prepared(tree):
            tree.data.tokenizer.shrink_model = None  # older versions wrote true, which had no effect
        if "model" not in content and (shape := _shape_of_weights(tree, schema, stored_shape)) is not None:
            _set_shape(tree, shape, given=[])
        _set_vocabulary(tree, schema, stored_shape, is_size_given="vocab_size" in (content.get("model") or {}))
        return OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_in_one_line(error, schema)}") from None


def _known(content: Mapping[str, Any], schema: type) -> dict[str, Any]:
    """Return the content of a config without keys that are null and that only older versions had."""
    known = {field.name for field in fields(schema)}
    return {key: value for key, value in content.items() if key in known or value is not None}


def _has_prepared(tree: DictConfig) -> bool:
    return any(source.kind is SourceKind.prepared for source in tree.data.sources.values())


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, or an empty one if the file is missing. Raises `ConfigError` if invalid."""
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        raise ConfigError(_not_yaml(error, str(path))) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # PyYAML raises it for an invalid date
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"{path} contains a value of type {type(content).__name__}: give keys and values")
    return content or {}


def to_mapping(run: Any) -> dict[str, Any]:
    """Return a checked config as plain dicts, lists, strings and numbers."""
    plain: dict[str, Any] = _plain(run)
    return plain


def quoted(text: str) -> str:
    """Quote a string as the value of a Hydra override, for any characters."""
    # In Hydra's quoted text a backslash is literal, except before a quote and at the end, where it must be doubled.
    escaped = re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text)
    return f"'{escaped}'"


def _as_list(word: str) -> str:
    """Return `plugins=[x.py,y.py]` for `plugins=x.py,y.py`."""
    key, _, value = word.partition("=")
    if key != "plugins" or not value or value == "null" or value[0] in "[$":
        return word
    names = [value] if _QUOTED.fullmatch(value) else value.split(",")
    return f"{key}=[{','.join(quoted(_unquoted(name)) for name in names)}]"


def _with_quoted_text(schema: type, word: str) -> str:
    """Quote the value of an override if its key has type `str`, so that Hydra's grammar does not interpret the text.
    Also quote the items of a list of text, and what the grammar refuses as the value of a plugin's option.

    The value is everything after the first `=`. There are three special forms. A value that is one quoted string means
    the text inside the quotes; `null` is null if the key allows it; `${stage:NAME}` is the folder of a recipe's stage.
    """
    key, equals, value = word.partition("=")
    try:
        kinds = types_along(schema, key)
    except ConfigError:
        return word  # a config group, Hydra's own syntax, or an unknown key, which is reported later
    is_list = get_args(kinds[-1]) == (str,) and value[:1] == "[" and value[-1:] == "]"
    if not equals or not (kinds[-1] is str or is_list or (kinds[-1] is Any and not _is_parsed(word))):
        return word
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ConfigError(f"{key} is {value!r}: this is not UTF-8, give it in UTF-8")
    if _unquoted(value) == _MISSING:
        raise ConfigError(f"{key} is {_MISSING}, which the config library takes for a missing value: give another text")
    if is_list:
        items = re.findall(rf"(?:\s*(?:{_QUOTED.pattern})\s*|[^,]+)(?=,|\Z)", value[1:-1], re.DOTALL)
        return f"{key}=[{','.join(_text(item.strip()) for item in items if item.strip())}]"
    is_nullable = is_dataclass(kinds[-2]) and get_type_hints(kinds[-2])[key.split(".")[-1]] is not str
    if value == "null" and is_nullable:
        return word
    return f"{key}={_text(value)}"


def _text(value: str) -> str:
    return quoted(_STAGE.sub(lambda match: match[1] or _escape(match[0]), _unquoted(value)))


def _is_parsed(word: str) -> bool:
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def _unquoted(value: str) -> str:
    """Return the text inside the quotes if the value is one quoted string, else the value unchanged."""
    if not _QUOTED.fullmatch(value):
        return value

    def halve_backslashes(match: re.Match[str]) -> str:
        return match[1][: len(match[1]) // 2] + match[2]

    return re.sub(rf"(\\+)({value[0]}|\Z)", halve_backslashes, value[1:-1])


def _escape(text: str) -> str:
    """Escape `${` so that OmegaConf does not interpolate the text."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def _escaped(content: Any) -> Any:
    """Return the content of a YAML file with every string escaped."""
    if isinstance(content, dict):
        return {key: _escaped(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_escaped(value) for value in content]
    return _escape(content) if isinstance(content, str) else content


def _plain(value: Any) -> Any:
    """Convert a value of a checked config to dicts, lists, strings and numbers."""
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value.name if isinstance(value, Enum) else value


def _split(schema: type, overrides: Sequence[Override]) -> tuple[list[str], list[tuple[str, Any]]]:
    """Check the keys of overrides; return (overrides for Hydra, keys and values in a dict of sections)."""
    direct: list[str] = []
    entries: list[tuple[str, Any]] = []
    for override in overrides:
        key = override.key_or_group
        assert override.input_line is not None
        if key == _SEARCH_PATH:  # folders with config groups of the user's own
            direct.append(override.input_line)
            continue
        if key.startswith("hydra."):
            raise ConfigError(
                f"{override.input_line}: of Hydra's own keys only {_SEARCH_PATH} can be set; remove this override"
            )
        kinds = types_along(schema, key)
        in_dict = any(get_origin(kind) is dict for kind in kinds[:-1])
        is_hidden = kinds[-1] is str and (data_folder("configs") / key).is_dir()  # Hydra takes the group of this name
        if override.is_delete() and not in_dict:
            raise ConfigError(f"~{key}: only an entry such as data.sources.maths can be removed; give {key} a value")
        value = override.value()
        if get_origin(kinds[-1]) is dict and isinstance(value, dict):
            entries += [(f"{key}.{name}", section) for name, section in value.items()]
        elif is_hidden or (in_dict and not override.is_delete()):
            entries.append((key, value))
        else:
            direct.append(override.input_line)
    return direct, entries


def _set_entry(tree: DictConfig, schema: type, *, key: str, value: Any) -> None:
    """Set a value in a dict of sections and create a missing entry: `data.sources.mine.path=x.jsonl`."""
    kinds = types_along(schema, key)
    parts = key.split(".")
    depth = next((depth for depth, kind in enumerate(kinds) if get_origin(kind) is dict), -1) + 1
    sections = OmegaConf.select(tree, ".".join(parts[: depth - 1])) if depth else tree
    with open_dict(sections):
        if depth and parts[depth - 1] not in sections and is_dataclass(kinds[depth]):
            sections[parts[depth - 1]] = OmegaConf.structured(kinds[depth])
    OmegaConf.update(tree, key, value, force_add=True)


def _no_stages(name: str) -> str:
    raise ConfigError(f"${{stage:{name}}} is only valid in a recipe: give a path")


def _not_yaml(error: Exception, path: str) -> str:
    """Return an error message for an invalid YAML file, with the line number if it is known."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        name = mark.name if path == "a config file" else path
        return f"{name}:{mark.line + 1} is not YAML: {error.problem}"
    if isinstance(error, yaml.reader.ReaderError):
        return f"{path} is not YAML: {error.reason} at position {error.position}; write it as plain UTF-8 text"
    return f"{path} is not YAML: {' '.join(str(error).split())}"


def _in_one_line(error: Exception, schema: type) -> str:
    """Return the message of a Hydra or OmegaConf error as one line that names the key."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return f"{group} is {choice!r}: {suggestion(choice, error.options or [])}"
    config_error = next((item for item in _chain(error) if isinstance(item, OmegaConfBaseException)), None)
    if config_error is None:
        return " ".join(str(error).split())
    message, key = str(config_error.msg or config_error).split("\n")[0], config_error.full_key
    cause = next((item for item in _chain(config_error) if isinstance(item, ConfigError)), None)
    if cause is not None:  # raised by our `stage` resolver or by a check of the config
        return f"{key}: {cause}" if key else str(cause)
    if not key:
        return message
    name, _, place = key.partition("[")  # such as export.consumers[0]
    try:
        kind = types_along(schema, name)[-1]
    except ConfigError as unknown:
        return str(unknown)
    if place and get_origin(kind) is list:
        kind = get_args(kind)[0]
    if isinstance(kind, type) and issubclass(kind, Enum) and config_error.value not in kind.__members__:
        return f"{key} is {str(config_error.value)!r}: {suggestion(str(config_error.value), list(kind.__members__))}"
    return f"{key}: {message}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its chain of causes (`__cause__`, `__context__`)."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__
