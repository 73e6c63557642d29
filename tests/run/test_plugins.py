"""Plugins: each is run, and what is wrong with one is a single line."""

import sys
from pathlib import Path

import pytest

from moetrain.compose import compose
from moetrain.errors import ConfigError
from moetrain.run.plugins import load_plugins, local_imports, plugins_digest
from moetrain.run.record import record_of


def test_a_plugin_with_the_name_of_a_module_is_run_too_and_once(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("runs = []\nruns.append(1)\n")
    first, second = (load_plugins([str(tmp_path / "json.py")])[-1] for _ in range(2))
    assert first is second
    assert first.runs == [1]
    assert sys.modules["json"] is not first


@pytest.mark.parametrize(
    ("files", "plugin", "message"),
    [
        ({"a.py": "import sys\nsys.exit(3)"}, "a.py", r"plugins: .*a\.py fails when it is imported: SystemExit: 3$"),
        ({"b.py": "raise ValueError('one\\n  two')"}, "b.py", r"b\.py fails .*: ValueError: one two$"),
        ({"c.py": "1 +"}, "c.py", r"c\.py fails when it is imported: SyntaxError: "),
        ({"pk1/__init__.py": "1 / 0", "pk1/sub.py": ""}, "pk1.sub", r"plugins: pk1\.sub fails .*: ZeroDivisionError"),
        ({"pk2/__init__.py": "import no_such", "pk2/sub.py": ""}, "pk2.sub", r"ModuleNotFoundError: .*no_such"),
        ({"pk3/__init__.py": ""}, "pk3.sub", r"plugins: there is no pk3\.sub; give a module"),
        ({}, ".foo", r"plugins: there is no \.foo; give a module that Python finds"),
        ({}, "d.py", r"plugins: there is no d\.py in /.*; give a module that Python finds, or the path"),
    ],
)
def test_what_a_plugin_raises_is_one_line(
    files: dict[str, str], plugin: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_plugins([plugin])
    assert "\n" not in str(caught.value)


def test_a_plugin_imports_the_modules_beside_it(tmp_path: Path) -> None:
    (tmp_path / "own_helper_of_a_plugin.py").write_text("SIZE = 3\n")
    (tmp_path / "own_plugin.py").write_text("from own_helper_of_a_plugin import SIZE\n")
    load_plugins([str(tmp_path / "own_plugin.py")])
    assert sys.modules["own_plugin"].SIZE == 3


def test_one_plugin_needs_no_brackets() -> None:
    for word in ("plugins=my task.py", "plugins='my task.py'", "plugins=['my task.py']"):
        assert compose("rl", [word]).plugins == ["my task.py"]
    for word in ("plugins=[a.py,b.py]", "plugins=a.py,b.py"):
        assert compose("rl", [word]).plugins == ["a.py", "b.py"]


def test_what_a_plugin_imports_from_its_folder_is_part_of_the_record(tmp_path: Path) -> None:
    plugin, helper, inner = (tmp_path / name for name in ("task.py", "helper.py", "parts/inner.py"))
    inner.parent.mkdir()
    (tmp_path / "moetrain").mkdir()
    for path, text in [
        (plugin, "import json\nfrom helper import reward\n"),
        (helper, "from parts import inner\nimport task\nimport moetrain.errors\n"),
        (tmp_path / "moetrain/__init__.py", ""),  # a plugin in a clone of this repository
        (inner, "VALUE = 1\n"),
        (inner.with_name("__init__.py"), ""),
        (tmp_path / "other.py", "VALUE = 2\n"),
    ]:
        path.write_text(text)
    assert local_imports(plugin) == [helper, inner.with_name("__init__.py"), inner]

    def digest() -> str:
        return record_of({"plugins": [str(plugin)]}, run_folder=tmp_path / "run", inputs={}).files["plugins"]

    before = digest()
    (tmp_path / "other.py").write_text("VALUE = 3\n")
    assert digest() == before
    inner.write_text("VALUE = 2000\n")
    assert digest() != before


def test_the_digest_of_plugins_is_that_of_their_code_and_of_what_they_import(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("import helper_of_own")
    (tmp_path / "helper_of_own.py").write_text("N = 2")
    first = plugins_digest([str(tmp_path / "own.py")])
    assert first == plugins_digest([str(tmp_path / "own.py")]) != "" == plugins_digest([])
    (tmp_path / "helper_of_own.py").write_text("N = 7")
    assert plugins_digest([str(tmp_path / "own.py")]) != first
