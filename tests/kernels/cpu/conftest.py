"""Every test of native kernels runs at every level that this CPU has, or at the one that is forced.

Tests of linear layers also run the kernels of other CPUs, their instructions in plain C++.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

from fuseline.kernels.build import build_library, find_compiler
from fuseline.kernels.cpu.library import LEVELS, SOURCE_FOLDER, library_source, load_library, supports

FORCED = os.environ.get("FUSELINE_CPU_ISA")
TESTED = [FORCED] if FORCED else list(LEVELS)
AVX512 = ("-DFUSELINE_EMULATE_WIDE", "-DFUSELINE_EMULATE_DOT4")
EMULATED = {"avx512, emulated": AVX512, "amx, emulated": (*AVX512, "-DFUSELINE_EMULATE_TILES")}


@pytest.fixture(params=TESTED, scope="session")
def library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    if not supports(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    return load_library(request.param)


@pytest.fixture(params=TESTED if FORCED else [*TESTED, *EMULATED], scope="session")
def linear_library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """As ``library``, or only the linear layers of it, emulated."""
    if request.param not in EMULATED:
        if not supports(request.param):
            pytest.skip(f"this CPU has no {request.param}")
        return load_library(request.param)
    whole = library_source("portable", frozenset())
    source = replace(
        whole,
        name="fuseline_cpu_emulated",
        sources=(*sorted(SOURCE_FOLDER.glob("linear*.cpp")), SOURCE_FOLDER / "team.cpp"),
        flags=(*whole.flags, "-O0", "-Wno-psabi", *EMULATED[request.param]),
    )
    return ctypes.CDLL(str(build_library(source, find_compiler(os.environ.get("CXX", ""), "g++", "c++"), jobs=2)))


@pytest.fixture(autouse=True)
def _small_team_again(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave the team of threads as small as it was: ranks that are threads of a process cannot share a larger one."""
    yield
    for name in {"library", "linear_library"}.intersection(request.fixturenames):
        request.getfixturevalue(name).fl_cpu_team_resize(1, None)
