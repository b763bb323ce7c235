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


def children(pid: int) -> set[Process]:
    """The children of ``pid``; empty where there is no /proc. Zombies do not count."""
    return set(_by_parent().get(pid, ()))


def descendants(pid: int) -> set[Process]:
    """Children of ``pid``, their children and so on."""
    by_parent = _by_parent()
    result: set[Process] = set()
    parents = [pid]
    while parents:
        for child in by_parent.get(parents.pop(), ()):
            result.add(child)
            parents.append(child.pid)
    return result


def family(word: str) -> set[Process]:
    """Descendants of this process with ``word`` in their command line, and all that descend from those."""
    roots = {process for process in descendants(os.getpid()) if has_word(process.pid, word)}
    return roots.union(*(descendants(process.pid) for process in roots))


def has_word(pid: int, word: str) -> bool:
    """Whether ``word`` is, or is part of, one of the words of its command line."""
    return any(word in argument for argument in _command_line(pid))


def program(process: Process) -> str:
    """The name of what it runs, without the way there; empty when it is gone."""
    return Path(_command_line(process.pid)[0]).name


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


def _by_parent() -> dict[int, list[Process]]:
    found: dict[int, list[Process]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        read = _read(int(entry.name))
        if read is not None:
            parent, process = read
            found.setdefault(parent, []).append(process)
    return found


def _command_line(pid: int) -> list[str]:
    """Its words; a single empty one when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return [""]
