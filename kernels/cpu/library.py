"""The native library of CPU kernels: which level to compile for, loaded once per process.

A level is a set of instructions: ``portable`` (any CPU), ``avx2``, ``avx512`` (with VNNI and bf16 where the CPU has
them) and ``amx``. One library holds all kernels, compiled for one level; the best that the CPU runs is taken, or the
one that ``FUSELINE_CPU_ISA`` names. ``FUSELINE_CPU_FLAGS`` adds flags of the compiler, for sanitizers and profilers.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shlex
from functools import cache
from pathlib import Path

from ..build import LibrarySource, build_library, find_compiler
from ..errors import BuildError

logger = logging.getLogger(__name__)

SOURCE_FOLDER = Path(__file__).parent.parent / "csrc" / "cpu"
# -ffp-contract=off: which products are fused with their sums is written out, not left to the compiler, so that an
# element's bits do not depend on the loop that computes it.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
)
LINK_FLAGS = ("-shared", "-pthread")

# What a level needs of the CPU, by the names of /proc/cpuinfo, and what turns it on. Best first.
LEVELS: dict[str, tuple[frozenset[str], tuple[str, ...]]] = {
    "amx": (
        frozenset({"amx_tile", "amx_bf16", "amx_int8", "avx512f", "avx512_bf16", "avx512_vnni"}),
        ("-mamx-tile", "-mamx-bf16", "-mamx-int8", "-mavx512bf16", "-mavx512vnni"),
    ),
    "avx512": (frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "f16c"}), ()),
    "avx2": (frozenset({"avx2", "fma", "f16c"}), ("-mavx2", "-mfma", "-mf16c")),
    "portable": (frozenset(), ()),
}
AVX512_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c")
# Instructions that are used beside a level's own where the CPU has them.
EXTRAS = {
    "avx512": {"avx512_vnni": "-mavx512vnni", "avx512_bf16": "-mavx512bf16"},
    "avx2": {"avx_vnni": "-mavxvnni"},
}


@cache
def cpu_features() -> frozenset[str]:
    """Names of the instruction sets that this CPU and system offer; empty where /proc does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def supports(level: str) -> bool:
    """Whether this CPU runs a level."""
    return LEVELS[level][0] <= cpu_features()


def default_level() -> str:
    """The level to use in this process.

    Raises:
        BuildError: ``FUSELINE_CPU_ISA`` names none, or one that this CPU does not run.
    """
    forced = os.environ.get("FUSELINE_CPU_ISA")
    if forced:
        if forced not in LEVELS or not supports(forced):
            usable = ", ".join(level for level in LEVELS if supports(level))
            raise BuildError(f"FUSELINE_CPU_ISA={forced!r} is not one of this CPU's levels: {usable}")
        return forced
    return next(level for level in LEVELS if supports(level))


def level_flags(level: str, features: frozenset[str]) -> tuple[str, ...]:
    """The compiler's flags of a level on a CPU with these features."""
    flags = LEVELS[level][1]
    if level in ("amx", "avx512"):
        flags = (*AVX512_FLAGS, *flags)
    return (*flags, *(flag for name, flag in EXTRAS.get(level, {}).items() if name in features))


def library_source(level: str, features: frozenset[str]) -> LibrarySource:
    """What the library of a level is built from."""
    extra_flags = shlex.split(os.environ.get("FUSELINE_CPU_FLAGS", ""))
    return LibrarySource(
        name=f"fuseline_cpu_{level}_{platform.machine()}",
        sources=tuple(sorted(SOURCE_FOLDER.glob("*.cpp"))),
        headers=tuple(sorted(SOURCE_FOLDER.glob("*.h"))),
        flags=(*FLAGS, *level_flags(level, features), *extra_flags),
        link_flags=(*LINK_FLAGS, *extra_flags),
    )


@cache
def load_library(level: str) -> ctypes.CDLL:
    """The library of a level, built if need be.

    Raises:
        BuildError: it cannot be built or loaded; CompilerNotFoundError if there is no compiler.
    """
    compiler = find_compiler(os.environ.get("CXX", ""), "g++", "c++")
    path = build_library(library_source(level, cpu_features()), compiler, jobs=len(os.sched_getaffinity(0)))
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded: {error}") from error


@cache
def native_library() -> ctypes.CDLL | None:
    """The library of this process, or None if there is none; then the reason has been logged, once."""
    try:
        return load_library(default_level())
    except BuildError as error:
        logger.warning("CPU kernels are not available, torch computes instead, which is slower. %s", error)
        return None
