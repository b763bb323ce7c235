"""Which processes descend from this one, and waiting for their end: shutting down leaves none behind."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

POLL_S = 0.02

logger = logging.getLogger(__name__)


class Process(NamedTuple):
    """A process for certain: ids are reused, but not with the same start time."""

    pid: int
    start_ticks: int


def descendants(pid: int) -> set[Process]:
    """Children of ``pid``, their children and so on; empty where there is no /proc. Zombies do not count."""
    children: dict[int, list[Process]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        found = _read(int(entry.name))
        if found is not None:
            parent, process = found
            children.setdefault(parent, []).append(process)
    result: set[Process] = set()
    parents = [pid]
    while parents:
        for child in children.get(parents.pop(), []):
            result.add(child)
            parents.append(child.pid)
    return result


def family(word: str) -> set[Process]:
    """Descendants of this process with ``word`` in their command line, and all that descend from those."""
    roots = {process for process in descendants(os.getpid()) if word.encode() in _command_line(process.pid)}
    return roots.union(*(descendants(process.pid) for process in roots))


def is_alive(process: Process) -> bool:
    """Whether it still runs."""
    found = _read(process.pid)
    return found is not None and found[1] == process


def wait_ended(processes: Iterable[Process], timeout_s: float) -> set[Process]:
    """Wait for the processes to end; returns those that have not when the time is up."""
    deadline = time.monotonic() + timeout_s
    left = {process for process in processes if is_alive(process)}
    while left and time.monotonic() < deadline:
        time.sleep(POLL_S)
        left = {process for process in left if is_alive(process)}
    return left


def end_all(processes: Iterable[Process], timeout_s: float) -> None:
    """Let the processes end by themselves; kill what is left when the time is up."""
    for process in wait_ended(processes, timeout_s):
        if timeout_s > 0:
            logger.warning("process %d has not ended within %g s: killing it", process.pid, timeout_s)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def _read(pid: int) -> tuple[int, Process] | None:
    """Parent and identity of a process; None when it is gone or a zombie."""
    try:
        # The name, in parentheses, may itself hold spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, parent, start_ticks = fields[0], int(fields[1]), int(fields[19])
    return None if state in "ZX" else (parent, Process(pid, start_ticks))


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
