"""The tests of native kernels once more, over a library that checks every address and every undefined operation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fuseline.kernels.cpu.library import supports

FOLDER = Path(__file__).parent
# Not optimised: that compiles in a third of the time, and keeps all accesses.
FLAGS = "-O0 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"


def runtime(compiler: str, name: str) -> str:
    """The sanitizer's library, which must be in the process before all others."""
    found = subprocess.run([compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True)
    return found.stdout.strip()


@pytest.mark.timeout(600)  # a compilation without optimisation, and tests over its slow result
def test_kernels_are_clean() -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or not Path(preload := runtime(compiler, "libasan.so")).is_absolute():
        pytest.skip("no compiler with sanitizers")
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{preload}:{runtime(compiler, 'libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "FUSELINE_CPU_FLAGS": FLAGS,
        "FUSELINE_CPU_ISA": "avx2" if supports("avx2") else "portable",
    }
    # Not this one, nor those whose programs are their own.
    left_out = {Path(__file__).name, "test_library.py", "test_team.py"}
    others = sorted(path for path in FOLDER.glob("test_*.py") if path.name not in left_out)
    # Nor a long search for differing bits and long contexts, which visit no code that the others do not.
    choice = ["-k", "not bits_depend_on_the_sequence_alone and not long_contexts"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *choice, *map(str, others)]
    command.append(str(FOLDER.parent / "test_exchange.py"))
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
