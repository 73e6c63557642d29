"""Programs with environments of their own are found by config, by variable, or here; what is given must have them."""

import sys
from pathlib import Path

import pytest

from moetrain import interpreters
from moetrain.errors import ConfigError
from moetrain.interpreters import ForeignProgram, find_interpreter, vllm_variables

ABSENT = ForeignProgram.vllm


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for program in ForeignProgram:
        monkeypatch.delenv(program.variable, raising=False)
    monkeypatch.setattr(interpreters, "find_spec", lambda name: None)


def test_a_program_that_is_nowhere_is_not_found() -> None:
    assert find_interpreter(ABSENT, None) is None


def test_this_interpreter_is_taken_when_it_has_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreters, "find_spec", {"vllm": "its spec"}.get)
    assert find_interpreter(ForeignProgram.vllm, None) == sys.executable
    assert find_interpreter(ForeignProgram.llama, None) is None


@pytest.mark.parametrize(
    ("python", "message"),
    [("/no/such/python", "is /no/such/python: it does not run"), ("EMPTY", "its environment has no vllm; run launch/")],
)
@pytest.mark.parametrize("source", ["vllm_python", "MOETRAIN_VLLM_PYTHON"])
def test_what_is_given_must_have_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, python: str, message: str
) -> None:
    empty = tmp_path / "python"  # an interpreter that sees no package
    empty.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} -I -S "$@"\n')
    empty.chmod(0o755)
    python = str(empty) if python == "EMPTY" else python
    given = None
    if source == "vllm_python":
        given = python
    else:
        monkeypatch.setenv(source, python)
    with pytest.raises(ConfigError, match=message) as error:
        find_interpreter(ForeignProgram.vllm, given)
    assert str(error.value).startswith(f"{source} is ")


def test_vllm_binds_threads_to_cores_and_loads_its_openmp_first(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libiomp5.so").touch()
    env = vllm_variables(str(tmp_path / "bin/python"), threads=1, cache_gib=3)
    assert env["LD_PRELOAD"] == str(tmp_path / "lib/libiomp5.so")
    assert env["KMP_AFFINITY"].endswith(f"proclist=[{env['VLLM_CPU_OMP_THREADS_BIND']}]")
    assert (env["OMP_NUM_THREADS"], env["VLLM_CPU_KVCACHE_SPACE"]) == ("1", "3")
