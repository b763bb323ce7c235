"""The team of threads, also with many more threads than cores and under a thread sanitizer."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fuseline.kernels.cpu.library import SOURCE_FOLDER
from fuseline.kernels.cpu.linear import linear

COMPILER = shutil.which(os.environ.get("CXX", "g++"))


@pytest.mark.parametrize(("sanitizer", "runs"), [("", [(1, 9), (2, 300), (16, 60)]), ("thread", [(4, 30)])])
def test_barriers_show_what_all_wrote(tmp_path: Path, sanitizer: str, runs: list[tuple[int, int]]) -> None:
    if COMPILER is None:
        pytest.skip("no compiler")
    program = tmp_path / "stress"
    flags = [
        "-std=c++17",
        "-O1",
        "-g",
        "-pthread",
        f"-I{SOURCE_FOLDER}",
        *([f"-fsanitize={sanitizer}"] * bool(sanitizer)),
    ]
    sources = [Path(__file__).parent / "team_stress.cpp", SOURCE_FOLDER / "team.cpp"]
    subprocess.run([COMPILER, *flags, *sources, "-o", program], check=True)
    for workers, rounds in runs:
        done = subprocess.run([program, str(workers), str(rounds)], capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (0, "0 wrong\n"), done.stderr


def test_only_sensible_sizes_are_taken(library: ctypes.CDLL) -> None:
    assert library.fl_cpu_team_resize(2, None) == 0
    for count in (0, -1, 1_000_000):
        assert library.fl_cpu_team_resize(count, None) == -1
    assert library.fl_cpu_team_size() == 2


def test_workers_can_be_pinned(library: ctypes.CDLL) -> None:
    cores = sorted(os.sched_getaffinity(0))
    assert library.fl_cpu_team_resize(2, (ctypes.c_int * 2)(cores[0], cores[-1])) == 0
    linear(library, torch.ones(1, 1), [torch.ones(1, 1)])
    assert os.sched_getaffinity(0) == set(cores)  # the caller is left alone
    threads = [int(path.name) for path in Path("/proc/self/task").iterdir()]
    assert {cores[-1]} in [os.sched_getaffinity(thread) for thread in threads]
    assert library.fl_cpu_team_resize(1, None) == 0
    linear(library, torch.ones(1, 1), [torch.ones(1, 1)])
    assert not [path for path in Path("/proc/self/task").iterdir() if int(path.name) not in threads]
