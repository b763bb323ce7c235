"""Sizing the team of threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fuseline.kernels.cpu import threads
from fuseline.kernels.cpu.library import native_library
from fuseline.kernels.cpu.threads import cgroup_cores, set_num_threads, usable_cores
from fuseline.kernels.errors import KernelArgumentError


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/a/b", {"cpu.max": "max 100000", "a/cpu.max": "250000 100000", "a/b/cpu.max": "max 100000"}, 2.5),
        ("0::/a/b", {"a/cpu.max": "50000 100000", "a/b/cpu.max": "400000 100000"}, 0.5),
        ("0::/", {}, None),
        ("0::/", {"cpu.max": "max 100000"}, None),
        (
            "3:cpu,cpuacct:/x",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "150000", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"},
            1.5,
        ),
        ("3:cpu:/x", {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, None),
        ("5:memory:/x", {"cpu.max": "100000 100000"}, None),
        ("0::/a", {"a/cpu.max": "not a limit"}, None),
    ],
)
def test_the_tightest_limit_of_the_cgroups_counts(
    tmp_path: Path, membership: str, files: dict[str, str], expected: float | None
) -> None:
    for name, text in {"self": membership, **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert cgroup_cores(tmp_path / "self", tmp_path) == expected


@pytest.mark.parametrize(("quota", "expected"), [(None, 3), (64.0, 3), (2.9, 2), (0.4, 1)])
def test_never_more_threads_than_cores_or_time(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2, 5})
    monkeypatch.setattr(threads, "cgroup_cores", lambda *_: quota)
    assert usable_cores() == expected


@pytest.fixture
def reset() -> Iterator[None]:
    yield
    set_num_threads(1)


@pytest.mark.usefixtures("reset")
def test_the_team_of_the_process_is_resized() -> None:
    library = native_library()
    if library is None:
        pytest.skip("no native kernels")
    for count in (3, 1):
        set_num_threads(count)
        assert library.fl_cpu_team_size() == count
    set_num_threads()
    assert library.fl_cpu_team_size() == usable_cores()
    with pytest.raises(KernelArgumentError, match="team of 0"):
        set_num_threads(0)
