"""Writes files and folders atomically, and JSON that every parser accepts; hashes files.

A file is written under a temporary name in the same folder, synced to disk, and renamed. JSON has no NaN and no
infinity: both become null.
"""

import hashlib
import itertools
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moetrain.stage_files import CONFIG


def user_path(text: str | Path) -> Path:
    """Return a path that a user typed, with `~` and `~name` replaced; unchanged if there is no such user."""
    return Path(os.path.expanduser(text))


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically; create the folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file that is synced and renamed to `path` when the block succeeds, else removed."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # ranks may write the same file at the same time
    try:
        yield scratch
        sync(scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def replace_folder(partial: Path, final: Path) -> None:
    """Rename the folder `partial` to `final`, both in the same folder, in place of a folder of this name."""
    replaced = final.with_name(f".{final.name}.replaced.tmp")
    if final.exists():
        remove_folder(replaced)  # left by a process that was killed
        final.rename(replaced)
    partial.rename(final)
    remove_folder(replaced)
    sync(final.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder, or the symbolic link to one, if there is one."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def write_json(path: Path, content: Mapping[str, Any], *, indent: int = 1) -> None:
    """Write a JSON object, indented, atomically."""
    write_text(path, to_json(content, indent=indent) + "\n")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, atomically."""
    write_text(path, "".join(to_json(row) + "\n" for row in rows))


def read_json_or_empty(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if the file is missing or contains no JSON object.

    For files that can be recreated, such as caches: a machine that crashes may leave such a file truncated.
    """
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def cache_folder() -> Path:
    """Return the cache folder, for files that can be recreated. Raises RuntimeError if the user has no home folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moetrain"


def cached_json(name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the JSON object in the file `name` of the cache folder; without it, that of `make`, which is then stored.

    The name must change with everything that `make` depends on. A damaged file is made again. If the folder cannot be
    written, nothing is stored. The result is what JSON makes of the content: tuples become lists.
    """
    try:
        path = cache_folder() / name
        stored = read_json_or_empty(path)
    except (OSError, RuntimeError):
        path, stored = None, {}
    content = stored.get("content")
    if isinstance(content, dict) and stored.get("sha256") == sha256_of_json(content):
        return content
    made: dict[str, Any] = json.loads(to_json(make()))
    if path is not None:
        with suppress(OSError):
            write_json(path, {"sha256": sha256_of_json(made), "content": made})
    return made


def to_json(value: object, *, indent: int | None = None) -> str:
    """Return `value` as JSON, with null for NaN and the infinities, which JSON cannot express."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, allow_nan=False)


def strict_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises ValueError also for NaN, infinities and numbers that become one, and for an object with a key twice.
    """

    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):
            raise ValueError(f"{number} is no JSON" if number[-1].isalpha() else f"{number} is too large")
        return value

    try:
        return json.loads(text, parse_constant=finite, parse_float=finite, object_pairs_hook=without_repeats)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class RepeatedKeyError(ValueError):
    """An object of JSON has a key twice. key: that key."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key!r} is there twice in one object")
        self.key = key


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of JSON with these keys and values. Raises RepeatedKeyError for a key that occurs twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise RepeatedKeyError(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return content


def sync(path: Path) -> None:
    """Wait until the content of a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def previous_name(path: Path) -> Path:
    """Return the first of `path`.previous, .previous.2, .previous.3 and so on that does not exist."""
    return _previous_names([path])[0]


def _previous_names(paths: Sequence[Path]) -> list[Path]:
    """Return new names for the paths: all end in .previous, or in .previous.2 and so on if one of those exists."""
    endings = (".previous" if number == 1 else f".previous.{number}" for number in itertools.count(1))
    names = ([path.with_name(path.name + ending) for path in paths] for ending in endings)
    return next(new for new in names if not any(map(os.path.lexists, new)))


def write_result(path: Path, content: Mapping[str, Any], *, beside: Sequence[str] = (CONFIG,)) -> Path | None:
    """Write the JSON object of a result. An earlier one with other content is renamed; return its new path, or None.

    beside: names in the same folder that belong to the earlier result, and are kept with the same ending: files are
    copied, folders renamed. What is there is not touched before the new result is on disk.
    """
    kept = None
    with atomic_file(path) as scratch:
        scratch.write_text(to_json(content, indent=1) + "\n", encoding="utf-8")
        sync(scratch)
        if path.is_file() and read_json_or_empty(path) != json.loads(to_json(content)):
            others = [other for name in beside if (other := path.with_name(name)).exists()]
            kept, *names = _previous_names([path, *others])
            for other, name in zip(others, names, strict=True):
                if other.is_dir():
                    other.rename(name)
                else:
                    shutil.copyfile(other, name)
            path.rename(kept)
    return kept


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(content: object) -> str:
    """Return the sha256 of `content` as JSON, with keys in their order."""
    return hashlib.sha256(to_json(content).encode()).hexdigest()


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
