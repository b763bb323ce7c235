"""Every test of native kernels runs at every level that this CPU has, or at the one that is forced."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator

import pytest

from fuseline.kernels.cpu.library import LEVELS, load_library, supports

FORCED = os.environ.get("FUSELINE_CPU_ISA")


@pytest.fixture(params=[FORCED] if FORCED else LEVELS, scope="session")
def library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    if not supports(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    return load_library(request.param)


@pytest.fixture(autouse=True)
def _small_team_again(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave the team of threads as small as it was: ranks that are threads of a process cannot share a larger one."""
    yield
    for name in {"library", "quantized_library"}.intersection(request.fixturenames):
        request.getfixturevalue(name).fl_cpu_team_resize(1, None)
