"""Record of a stage in its folder: its config, digests of the files that it reads, and ids of its input stages.

A stage is unchanged while these are equal. The record contains neither file times nor the code of moetrain.
"""

import glob
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moetrain.compose import read_yaml
from moetrain.config_keys import as_typed
from moetrain.data.config import SourceKind
from moetrain.data.store.index import INDEX, is_prepared
from moetrain.errors import ConfigError
from moetrain.files import read_json_or_empty, sha256_of, user_path, write_json
from moetrain.run.plugins import local_imports
from moetrain.stage_files import CONFIG, DONE, EVALUATION, MACHINE, MADE_BY, METRICS, STARTED, TIMES

_log = logging.getLogger(__name__)

_DIGESTS = ".digests.json"
_IGNORED_KEYS = ("run.folder", "run.name", "run.wandb.project", "run.wandb.mode", "dry_run", "device_tflops")
"""Config keys that do not affect results."""
_DERIVED_KEYS = ("data.tokenizer.shrink_model",)
"""Config keys whose default follows from other keys; older versions did not have them, or gave them no effect."""
_PATH_KEYS = ("path", "plugins", "init_from", "continue_from", "masters", "before", "codes_before")
"""Last parts of the keys that name files or folders, also without a slash."""
_BOOKKEEPING = (MADE_BY, STARTED, DONE, TIMES, "wandb_id", METRICS, MACHINE)
_RESULTS_OF_A_STAGE = ("checkpoints", "model", EVALUATION)
_RUN_PLACEHOLDER = "<run>"
_LARGE = 1 << 30  # bytes; hashing a file of this size or more is logged
_MAX_SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True, kw_only=True)
class Record:
    """Inputs of a stage that determine its results.

    config: values by dotted key, with the run's folder replaced by `<run>`. files: sha256 of the file or folder that a
    key names, by key, with what plugins import from their folders. inputs: id of each earlier stage whose results are
    used, by name. older: like `files`, by the rule of versions that hashed all files of a stage's folder.
    """

    config: Mapping[str, Any]
    files: Mapping[str, str]
    inputs: Mapping[str, str]
    older: Mapping[str, str] = field(default_factory=dict)

    def stored(self) -> dict[str, Any]:
        """Return what is written when a stage starts."""
        return {"config": self.config, "files": self.files, "inputs": self.inputs}


def record_of(config: Mapping[str, Any], *, run_folder: Path, inputs: Mapping[str, str]) -> Record:
    """Return the record of a stage. config: its config as plain values."""
    flat = _without_folder(config, run_folder)
    files, older = {}, {}
    digests = _Digests(run_folder)
    for key, value in flat.items():
        paths = [path for text in _strings(value) for path in _outside(text, key=key, run_folder=run_folder)]
        if paths:
            helpers = [helper for path in paths for helper in local_imports(path)] if key == "plugins" else []
            files[key] = _combine([digests.of(path) for path in [*paths, *helpers]])
            older[key] = _combine([digests.of(path, with_bookkeeping=True) for path in paths])
    digests.save()
    return Record(config=flat, files=files, inputs=inputs, older=older)


def stored_record(folder: Path) -> Record | None:
    """Return the record with which a stage started, or None if no stage has started in `folder`.

    The config is that of config.yaml, which a stage that was started by hand with other values replaces. Where the
    record is missing or damaged, the file digests are unknown.
    """
    if not any((folder / name).is_file() for name in (STARTED, CONFIG)):
        return None
    started = read_json_or_empty(folder / STARTED)
    config, files, inputs = (_mapping(started.get(name)) for name in ("config", "files", "inputs"))
    try:
        by_hand = read_yaml(folder / CONFIG)
    except ConfigError:
        by_hand = {}
    own = _mapping(by_hand.get("run"))
    config = _without_folder(by_hand, Path(own.get("folder", "")) / own.get("name", "")) or config
    return Record(config=config, files=files, inputs=inputs)


def _mapping(value: object) -> dict[str, Any]:
    """Return a mapping from a file that may be damaged; an empty one for another value."""
    return dict(value) if isinstance(value, Mapping) else {}


def config_changes(folder: Path, config: Mapping[str, Any], *, keys: tuple[str, ...]) -> list[str]:
    """Return the differences of `config`, as plain values, to the config.yaml in a stage's folder.

    keys: beginnings of the keys that are compared.
    """
    before = flattened(read_yaml(folder / CONFIG)) if (folder / CONFIG).is_file() else {}
    one, other = [
        Record(config={key: value for key, value in flat.items() if key.startswith(keys)}, files={}, inputs={})
        for flat in (before, flattened(config))
    ]
    return changes(one, other, defaults=dict)


def changes(before: Record, now: Record, *, defaults: Callable[[], Mapping[str, Any]]) -> list[str]:
    """Return the differences of two records as text, such as `train.steps: 50 -> 100`.

    defaults: the values of a config without overrides, by dotted key. A key that an older version did not write counts
    as its default; a key that no longer exists is ignored.
    """
    if not before.config:  # the earlier config is unknown
        return []
    known_config = before.config if now.config.keys() <= before.config.keys() else {**defaults(), **before.config}
    differences = []
    for key, value in now.config.items():
        if key in now.files and key in before.files:
            if before.files[key] not in (now.files[key], now.older.get(key)):
                differences.append(f"{key}: the content of {value} changed")
        elif key in _DERIVED_KEYS and (key not in before.config or _has_prepared(now.config)):
            continue
        elif key not in known_config:
            if not _has_section(before.config, key):
                differences.append(f"{key}: nothing -> {_shortened(value)}")
        elif known_config[key] != value:
            differences.append(f"{key}: {_shortened(known_config[key])} -> {_shortened(value)}")
    removed = dict.fromkeys(key.rpartition(".")[0] for key in before.config if not _has_section(now.config, key))
    differences += [f"{section}: removed" for section in removed]
    return differences + [
        f"its input stage {name} was run again"
        for name, identity in now.inputs.items()
        if before.inputs.get(name, identity) != identity
    ]


def _has_prepared(config: Mapping[str, Any]) -> bool:
    """Return whether a source is prepared data, whose tokenizer is used."""
    return any(key.endswith(".kind") and value == SourceKind.prepared for key, value in config.items())


def _has_section(config: Mapping[str, Any], key: str) -> bool:
    """Return whether a config contains the section of `key`."""
    section = key.rpartition(".")[0]
    return not section or any(other.startswith(f"{section}.") for other in config)


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by dotted key; an empty mapping is a value."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _without_folder(config: Mapping[str, Any], run_folder: Path) -> dict[str, Any]:
    flat = flattened(config)
    return {
        key: _with_run_placeholder(value, str(run_folder)) for key, value in flat.items() if key not in _IGNORED_KEYS
    }


def _with_run_placeholder(value: Any, folder: str) -> Any:
    if isinstance(value, str):
        inside = value == folder or value.startswith(f"{folder}/")
        return _RUN_PLACEHOLDER + value.removeprefix(folder) if inside else value
    return [_with_run_placeholder(item, folder) for item in value] if isinstance(value, list) else value


def _strings(value: Any) -> Iterator[str]:
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str):
            yield item


def _outside(text: str, *, key: str, run_folder: Path) -> list[Path]:
    """Return the files and folders outside of the run folder that a value names: itself, or the matches of a glob."""
    if key.rpartition(".")[2] not in _PATH_KEYS and "/" not in text:
        return []
    path = user_path(text)
    try:
        named = [path] if path.exists() else _matches(path) if key.endswith(".path") else []
        return [item for item in named if not item.resolve().is_relative_to(run_folder.resolve())]
    except OSError:  # the text is not a valid path, such as one that is too long
        return []


def _matches(path: Path) -> list[Path]:
    """Return the files of a glob, or of a data set that Megatron names without the endings."""
    megatron = [path.with_name(path.name + ending) for ending in (".bin", ".idx")]
    if all(item.is_file() for item in megatron):
        return megatron
    return sorted(Path(item) for item in glob.glob(str(path), recursive=True) if Path(item).is_file())


class _Digests:
    """Cache of sha256 digests in the run folder. A file with the same size, time and inode is not read again."""

    def __init__(self, run_folder: Path) -> None:
        self._path = run_folder / _DIGESTS
        self._known = read_json_or_empty(self._path)
        self._is_new = False

    def of(self, path: Path, *, with_bookkeeping: bool = False) -> str:
        """Return the digest of a file, or of the names and contents of all files in a folder.

        with_bookkeeping: also of the files in a stage's folder that are no results.
        """
        if not path.is_dir():
            return self._of_file(path)
        if is_prepared(path):  # the index holds the digests of the files, which may be terabytes
            return self._of_file(path / INDEX)
        files = sorted(item for item in path.rglob("*") if item.is_file())
        if not with_bookkeeping:
            files = [item for item in files if not _is_bookkeeping(item, of=path)]
        return _combine([f"{item.relative_to(path).as_posix()}\0{self._of_file(item)}" for item in files])

    def _of_file(self, path: Path) -> str:
        status = path.stat()
        mark = [status.st_size, status.st_mtime_ns, status.st_ino]
        name = str(path.resolve())
        if self._known.get(name, [None])[:-1] != mark:
            if status.st_size >= _LARGE:
                _log.info("hashing %s (%.1f GB)", path, status.st_size / 1e9)
            self._known[name] = [*mark, sha256_of(path)]
            self._is_new = True
        return str(self._known[name][-1])

    def save(self) -> None:
        """Write new digests to the run folder, if it exists."""
        if self._is_new and self._path.parent.is_dir():
            write_json(self._path, self._known)


def _is_bookkeeping(path: Path, *, of: Path) -> bool:
    """Return whether a file in the folder `of`, if that is a stage's, has times and ids of runs and no results."""
    if not (of / CONFIG).is_file() or not any((of / name).exists() for name in _RESULTS_OF_A_STAGE):
        return False
    parts = path.relative_to(of).parts
    return path.name in _BOOKKEEPING or any(part.startswith(".") or part == "wandb" for part in parts)


def _combine(digests: Sequence[str]) -> str:
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _shortened(value: Any) -> str:
    text = as_typed(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
