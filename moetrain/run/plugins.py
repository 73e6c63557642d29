"""Loads plugins: modules of the user or of installed packages that register task families, RL algorithms and columns,
chat templates or data formats."""

import ast
import hashlib
import importlib
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from moetrain.errors import ConfigError, described
from moetrain.files import user_path

T = TypeVar("T")
PLUGINS = "moetrain.plugins"
"""Entry-point group with which an installed package registers plugins."""


def load_plugins(plugins: Sequence[str]) -> list[ModuleType]:
    """Import the plugins of installed packages (entry points) and the given plugins; return the modules.

    Each is imported once per process. Raises a one-line `ConfigError` if a plugin is missing or its import fails.
    """
    entries = sorted(entry_points(group=PLUGINS), key=lambda entry: entry.name)
    modules = [_run_plugin_code(f"entry point {entry.name}", entry.load) for entry in entries]
    return [*modules, *(_load(plugin) for plugin in plugins)]


def plugin_spec(plugin: str) -> importlib.machinery.ModuleSpec:
    """Return the module spec of a plugin: a .py file, or a module on `sys.path` or in the current folder."""
    spec = _of_file(user_path(plugin)) if plugin.endswith(".py") else _of_module(plugin)
    if spec is None or spec.loader is None:
        where = f" in {os.getcwd()}" if plugin.endswith(".py") and not os.path.isabs(plugin) else ""
        raise ConfigError(
            f"plugins: there is no {plugin}{where}; give a module that Python finds, or the path of a .py file"
        )
    return spec


def _load(plugin: str) -> ModuleType:
    spec = plugin_spec(plugin)
    if spec.name in sys.modules:
        return sys.modules[spec.name]
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    assert spec.loader is not None
    loader = spec.loader
    try:
        _run_plugin_code(plugin, lambda: loader.exec_module(module))
    except ConfigError:
        del sys.modules[spec.name]
        raise
    return module


def _of_file(path: Path) -> importlib.machinery.ModuleSpec | None:
    """Return the spec of a .py file, whose folder is searched for the modules that it imports.

    The module gets the stem of the file, with a hash added if the name is taken.
    """
    path = path.resolve()
    if not path.is_file():
        return None
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    name = path.stem
    other = sys.modules.get(name)
    if other is not None and (other.__spec__ is None or other.__spec__.origin != str(path)):
        name = f"{name}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    return importlib.util.spec_from_file_location(name, path)


def _of_module(plugin: str) -> importlib.machinery.ModuleSpec | None:
    if not all(part.isidentifier() for part in plugin.split(".")):
        return None
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())

    def find() -> importlib.machinery.ModuleSpec | None:
        try:
            return importlib.util.find_spec(plugin)  # imports the parent packages of the module
        except ModuleNotFoundError as error:
            if error.name is not None and f"{plugin}.".startswith(f"{error.name}."):
                return None
            raise

    return _run_plugin_code(plugin, find)


def _run_plugin_code(plugin: str, function: Callable[[], T]) -> T:
    """Return the result of `function`, which runs a plugin's code; turn any exception into a one-line `ConfigError`."""
    try:
        return function()
    except (Exception, SystemExit) as error:  # a plugin's own code
        reason = " ".join(described(error).split())
        raise ConfigError(f"plugins: {plugin} fails when it is imported: {reason}") from error


def plugins_digest(plugins: Sequence[str]) -> str:
    """Return a digest of the files of plugins and of what they import from their folders; "" without plugins.

    Results of an unfinished stage that another version of its environment gave are not used together with new ones.
    """
    if not plugins:
        return ""
    found = hashlib.sha256()
    for origin in (plugin_spec(plugin).origin for plugin in plugins):
        path = Path(origin or "")
        for file in [path, *local_imports(path)] if path.is_file() else []:
            found.update(hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


def local_imports(plugin: Path) -> list[Path]:
    """Return the files that a plugin imports from its own folder, directly or through each other, sorted.

    This package is not among them: its code does not make a finished stage run again.
    """
    found: set[Path] = set()
    waiting = [plugin]
    while waiting:
        path = waiting.pop()
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, ValueError, SyntaxError):  # reported when it is imported
            continue
        modules = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):  # `from . import x` has no module
                modules += [node.module] if node.module else [alias.name for alias in node.names]
        for name in {module.partition(".")[0] for module in modules} - {__name__.partition(".")[0]}:
            package = plugin.parent / name
            files = [*package.rglob("*.py")] if (package / "__init__.py").is_file() else [package.with_suffix(".py")]
            new = [file for file in files if file.is_file() and file not in found and file != plugin]
            found.update(new)
            waiting += new
    return sorted(found)
