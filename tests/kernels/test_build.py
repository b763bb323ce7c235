"""Compile-and-cache: what is compiled when, and what is refused."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fuseline.kernels import build
from fuseline.kernels.build import LibrarySource, build_library, find_compiler
from fuseline.kernels.errors import BuildError, CompilerNotFoundError

Count = Callable[[], int]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSELINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compiler(tmp_path: Path) -> Path:
    """The compiler, behind a script that writes a line per run other than for its version."""
    real = shutil.which("g++")
    if real is None:
        pytest.skip("no compiler")
    script = tmp_path / "compiler"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] || echo "$@" >> {tmp_path}/runs\nexec {real} "$@"\n')
    script.chmod(0o755)
    (tmp_path / "runs").touch()
    return script


@pytest.fixture
def runs(tmp_path: Path) -> Count:
    return lambda: len((tmp_path / "runs").read_text().splitlines())


@pytest.fixture
def source(tmp_path: Path) -> LibrarySource:
    (tmp_path / "value.h").write_text("#define VALUE 1\n")
    (tmp_path / "one.cpp").write_text('#include "value.h"\nextern "C" int answer() { return VALUE; }\n')
    (tmp_path / "two.cpp").write_text('extern "C" int other() { return 2; }\n')
    paths = (tmp_path / "one.cpp", tmp_path / "two.cpp")
    return LibrarySource("answers", paths, (tmp_path / "value.h",), ("-fPIC",))


def answer(path: Path) -> int:
    # Through a process of its own: a library that is loaded under one name stays what it was.
    code = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).answer())"
    return int(subprocess.run([sys.executable, "-c", code, path], check=True, capture_output=True).stdout)


def test_what_has_not_changed_is_not_compiled_again(source: LibrarySource, compiler: Path, runs: Count) -> None:
    first = build_library(source, str(compiler))
    assert (answer(first), runs()) == (1, 3)  # two objects and a library
    assert (build_library(source, str(compiler), jobs=2), runs()) == (first, 3)
    source.sources[1].write_text('extern "C" int other() { return 3; }\n')
    second = build_library(source, str(compiler))
    assert second != first
    assert runs() == 5  # one object and the library
    source.headers[0].write_text("#define VALUE 7\n")
    third = build_library(source, str(compiler))
    assert (answer(third), answer(first), runs()) == (7, 1, 8)
    assert build_library(replace(source, flags=("-fPIC", "-O2")), str(compiler)) not in (first, second, third)


@pytest.mark.parametrize("damage", ["truncated", "changed", "no checksum"])
def test_a_damaged_library_is_built_again(source: LibrarySource, compiler: Path, runs: Count, damage: str) -> None:
    path = build_library(source, str(compiler))
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "changed":
        path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    else:
        path.with_suffix(".sha256").unlink()
    assert (build_library(source, str(compiler)), runs()) == (path, 4)
    assert answer(path) == 1


def test_processes_that_start_at_once_compile_once(source: LibrarySource, compiler: Path, runs: Count) -> None:
    code = f"""
import sys
from pathlib import Path
from fuseline.kernels.build import LibrarySource, build_library
paths = [Path(path) for path in sys.argv[1:]]
print(build_library(LibrarySource("answers", tuple(paths[:2]), (paths[2],), ("-fPIC",)), {str(compiler)!r}))
"""
    command = [sys.executable, "-c", code, *map(str, (*source.sources, *source.headers))]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert runs() == 3
    assert answer(Path(paths.pop())) == 1
    assert not paths


def test_an_error_says_what_the_compiler_said(source: LibrarySource, compiler: Path, cache: Path) -> None:
    source.sources[0].write_text("int broken(\n")
    with pytest.raises(BuildError, match=r"one\.cpp.*error"):
        build_library(source, str(compiler))
    assert not list(cache.glob("*.so")) + list(cache.glob("objects/.building-*"))


def test_a_missing_compiler_and_a_missing_source_are_told_apart(source: LibrarySource, compiler: Path) -> None:
    with pytest.raises(CompilerNotFoundError, match="found none of nothing-of-the-kind"):
        find_compiler("", "nothing-of-the-kind")
    assert find_compiler("nothing-of-the-kind", "sh") == shutil.which("sh")
    with pytest.raises(CompilerNotFoundError, match="cannot run"):
        build_library(source, "/nothing/of/the/kind")
    source.sources[0].unlink()
    with pytest.raises(BuildError, match=r"one\.cpp"):
        build_library(source, str(compiler))


def test_a_cache_that_others_can_write_is_refused(source: LibrarySource, compiler: Path, cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(BuildError, match="can be written by others"):
        build_library(source, str(compiler))


def test_a_library_that_others_could_have_put_there_is_not_used(
    source: LibrarySource, compiler: Path, cache: Path
) -> None:
    build_library(source, str(compiler))
    cache.chmod(0o777)
    with pytest.raises(BuildError, match="can be written by others"):
        build_library(source, str(compiler))


def test_without_a_home_to_write_the_cache_lies_among_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FUSELINE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / ".cache" / "fuseline" / "kernels"
    elsewhere = Path(tempfile.gettempdir()) / f"fuseline-{os.getuid()}-kernels"
    (tmp_path / "file").touch()
    for home in (tmp_path / "file", "~"):  # no folder, and what a user without an entry in /etc/passwd is left with
        monkeypatch.setenv("HOME", str(home))
        assert build.cache_folder() == elsewhere


def test_a_home_that_one_may_not_look_into_is_none_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by what the system says, since to root it says no such thing."""
    (tmp_path / ".cache").mkdir()
    look = os.stat

    def stat(path: str | Path, **options: bool) -> os.stat_result:
        if tmp_path / ".cache" in Path(path).parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return look(path, **options)

    monkeypatch.delenv("FUSELINE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.setattr(os, "access", lambda path, mode: tmp_path not in Path(path).parents)
    assert build.cache_folder() == Path(tempfile.gettempdir()) / f"fuseline-{os.getuid()}-kernels"


def test_the_cache_stays_small(
    source: LibrarySource, compiler: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "MAX_LIBRARIES", 2)
    monkeypatch.setattr(build, "MAX_OBJECTS", 3)
    paths = []
    for value in range(4):
        source.headers[0].write_text(f"#define VALUE {value}\n")
        paths.append(build_library(source, str(compiler)))
        os.utime(paths[-1], (value, value))
    assert {path.name for path in cache.glob("*.so")} == {path.name for path in paths[2:]}
    assert len(list(cache.glob("*.sha256"))) == 2
    assert len(list(cache.glob("objects/*.o"))) == 3
    assert ctypes.CDLL(str(paths[3])).answer() == 3
