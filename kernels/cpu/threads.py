"""How many threads compute on this machine's CPU, and where."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from ..errors import KernelArgumentError
from .library import native_library

CGROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """The cores that this process may keep busy: its affinity, and the CPU time of its cgroups; at least 1."""
    cores = len(os.sched_getaffinity(0))
    quota = cgroup_cores(Path("/proc/self/cgroup"), CGROUPS)
    return cores if quota is None else max(1, min(cores, int(quota)))


def cgroup_cores(membership: Path, root: Path) -> float | None:
    """The least CPU time per time that a process's cgroup, or one around it, allows; None for no limit.

    Args:
        membership: the process's ``/proc/…/cgroup``.
        root: where the hierarchies are mounted.
    """
    limits = []
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / controllers if controllers else root
        folder = base / path.lstrip("/")
        for place in (folder, *(parent for parent in folder.parents if parent.is_relative_to(base))):
            limit = _quota_v1(place) if controllers else _quota_v2(place)
            limits += [] if limit is None else [limit]
    return min(limits, default=None)


def _quota_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def _quota_v1(folder: Path) -> float | None:
    try:
        quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    except (OSError, ValueError):
        return None
    return None if quota < 0 else quota / period


def set_num_threads(count: int | None = None) -> None:
    """Size the process's team of threads; None takes ``usable_cores``. Does nothing without native kernels.

    A team that takes every core is pinned, one thread to a core: nobody else is meant to be there. A smaller one is
    not, since several such processes would pin to the same cores. The calling thread never is.

    Raises:
        KernelArgumentError: ``count`` is out of range.
    """
    library = native_library()
    if library is None:
        return
    count = usable_cores() if count is None else count
    cores = sorted(os.sched_getaffinity(0))
    pinned = (ctypes.c_int * count)(*cores) if count == len(cores) > 1 and count == usable_cores() else None
    if library.fl_cpu_team_resize(ctypes.c_int(count), pinned) != 0:
        raise KernelArgumentError(f"a team of {count} threads is out of range")
