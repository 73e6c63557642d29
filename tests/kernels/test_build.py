"""How the native kernels are compiled and chosen."""

import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from moetrain.errors import ConfigError
from moetrain.kernels import build, choice
from moetrain.kernels.build import SOURCES, UnavailableError, Units, load
from moetrain.kernels.choice import find, usable
from moetrain.kernels.config import Kernels


@pytest.fixture
def nothing_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have `load` begin anew, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "load", load.__wrapped__)
    return tmp_path


def _take_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Have the compiler be a shell script."""
    compiler = folder / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))


def test_the_library_is_compiled_once_and_then_read(nothing_loaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_FLAGS", ("-O1", *build._FLAGS[1:]))  # takes half the time
    load.__wrapped__()
    (made,) = (nothing_loaded / "moetrain").iterdir()
    changed = made.stat().st_mtime_ns
    assert load.__wrapped__().path == made
    assert [path.stat().st_mtime_ns for path in (nothing_loaded / "moetrain").iterdir()] == [changed]


def test_ranks_that_start_together_compile_once(nothing_loaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = 'echo call >> "$COUNT"; sleep 0.3; until [ "$1" = -o ]; do shift; done; echo made > "$2"'
    monkeypatch.setenv("COUNT", str(nothing_loaded / "count"))
    _take_compiler(nothing_loaded, monkeypatch, script)
    path = nothing_loaded / "moetrain" / "kernels-1.so"
    compiler = str(nothing_loaded / "compiler")
    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(build._compile, compiler, (), path) for _ in range(3)]:
            done.result()
    assert (nothing_loaded / "count").read_text() == "call\n"
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_added_flags_reach_the_compiler_and_name_another_library(
    nothing_loaded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = build.compiler()
    assert found is not None
    plain = build._key(found, ())
    monkeypatch.setenv("MOETRAIN_KERNEL_FLAGS", "-O1 -no-such-flag")
    assert build._key(found, ()) != plain
    with pytest.raises(UnavailableError, match="no-such-flag"):
        load.__wrapped__()


def test_without_a_compiler_auto_is_torch_and_native_is_refused(
    nothing_loaded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "compiler", lambda: None)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    library, why = find(Kernels.auto)
    assert library is None
    assert "no C++ compiler found" in why
    with pytest.raises(ConfigError, match=r"kernels=native is unavailable here: no C\+\+ compiler"):
        find(Kernels.native)


def test_a_compiler_that_fails_leaves_nothing_and_its_words_are_shown(
    nothing_loaded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _take_compiler(nothing_loaded, monkeypatch, "echo 'no such instruction' >&2; exit 1")
    with pytest.raises(UnavailableError, match="no such instruction"):
        load.__wrapped__()
    assert list((nothing_loaded / "moetrain").iterdir()) == []


def test_a_user_without_a_home_has_torchs_kernels(nothing_loaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(Path, "home", homeless)
    library, why = find(Kernels.auto)
    assert library is None
    assert "home directory" in why


def test_clang_is_refused(nothing_loaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _take_compiler(nothing_loaded, monkeypatch, "echo 'Debian clang version 14.0.6'")
    with pytest.raises(UnavailableError, match="OpenMP"):
        load.__wrapped__()


def test_a_cache_that_cannot_be_written_is_named(nothing_loaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (nothing_loaded / "moetrain").write_text("a file")
    with pytest.raises(UnavailableError, match="cannot be written"):
        load.__wrapped__()


def test_a_library_that_is_none_is_named(nothing_loaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(found: str, target: Sequence[str], path: Path) -> None:
        path.parent.mkdir()
        path.write_bytes(b"no library")

    monkeypatch.setattr(build, "_compile", torn)
    with pytest.raises(UnavailableError, match="cannot be loaded"):
        load.__wrapped__()


def test_torch_is_taken_where_it_is_asked_for_or_alone_multiplies_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(Kernels.torch)[0] is None
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(load(), "units", Units.widened)
    library, why = find(Kernels.auto)
    assert library is None
    assert "AMX" in why
    assert find(Kernels.native)[0] is not None


def test_the_native_kernels_take_bfloat16_on_a_cpu_alone() -> None:
    library = load()
    half = torch.zeros(1, dtype=torch.bfloat16)
    assert usable(library, half) is library
    assert usable(None, half) is None
    assert usable(library, half.float()) is None
    assert usable(library, half.to("meta")) is None


@pytest.mark.parametrize("flags", [["-march=native"], ["-march=haswell"], ["-march=x86-64"]])
def test_the_sources_compile_without_a_warning(flags: list[str], tmp_path: Path) -> None:
    found = build.compiler()
    assert found is not None
    command = [found, "-O1", "-std=c++17", "-fopenmp", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", *flags]
    subprocess.run([*command, str(SOURCES / "kernels.cpp")], check=True)
