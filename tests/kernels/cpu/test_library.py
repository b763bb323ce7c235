"""Which level is taken, and what happens where none can be compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fuseline.kernels.build import find_compiler
from fuseline.kernels.cpu import library
from fuseline.kernels.cpu.library import LEVELS, default_level, level_flags, supports
from fuseline.kernels.errors import BuildError

ZEN3 = frozenset({"avx2", "fma", "f16c"})
SKYLAKE = ZEN3 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
SAPPHIRE_RAPIDS = SKYLAKE | {"avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"}


@pytest.mark.parametrize(
    ("features", "level"),
    [
        (frozenset(), "portable"),
        (ZEN3 - {"fma"}, "portable"),
        (ZEN3, "avx2"),
        (SKYLAKE, "avx512"),
        (SAPPHIRE_RAPIDS, "amx"),
    ],
)
def test_the_best_level_that_the_cpu_has(
    monkeypatch: pytest.MonkeyPatch, features: frozenset[str], level: str
) -> None:
    monkeypatch.delenv("FUSELINE_CPU_ISA", raising=False)
    monkeypatch.setattr(library, "cpu_features", lambda: features)
    assert default_level() == level


def test_a_level_can_be_forced_but_not_beyond_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "cpu_features", lambda: ZEN3)
    monkeypatch.setenv("FUSELINE_CPU_ISA", "portable")
    assert default_level() == "portable"
    for wrong in ("avx512", "sse9"):
        monkeypatch.setenv("FUSELINE_CPU_ISA", wrong)
        with pytest.raises(BuildError, match=f"{wrong}.*: avx2, portable"):
            default_level()


def test_flags_follow_the_features() -> None:
    assert level_flags("portable", SAPPHIRE_RAPIDS) == ()
    assert "-mavx512vnni" not in level_flags("avx512", SKYLAKE)
    assert "-mavx512vnni" in level_flags("avx512", SKYLAKE | {"avx512_vnni"})
    assert {"-mamx-tile", "-mavx512vnni", "-mfma"} <= set(level_flags("amx", SAPPHIRE_RAPIDS))


@pytest.mark.parametrize(
    ("environment", "reason"),
    [({"PATH": "/nowhere", "CXX": ""}, "no compiler"), ({"FUSELINE_CPU_ISA": "sse9"}, "sse9")],
)
def test_without_kernels_there_is_one_clear_notice(tmp_path: Path, environment: dict[str, str], reason: str) -> None:
    code = "from fuseline.kernels.cpu.library import native_library as f; print(f(), f())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FUSELINE_CACHE": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "None None\n"
    assert done.stderr.count("CPU kernels are not available, torch computes instead") == 1
    assert reason in done.stderr


@pytest.mark.parametrize("level", [level for level in LEVELS if not supports(level)])
def test_sources_compile_for_other_cpus(level: str) -> None:
    """Only checks syntax and intrinsics: generating code takes far longer."""
    source = library.library_source(level, SAPPHIRE_RAPIDS)
    try:
        compiler = find_compiler(os.environ.get("CXX", ""), "g++", "c++")
    except BuildError:
        pytest.skip("no compiler")
    command = [compiler, *source.flags, "-Werror", "-fsyntax-only"]
    for path in source.sources:
        done = subprocess.run([*command, str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
