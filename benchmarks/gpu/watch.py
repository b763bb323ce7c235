"""Runs a command that may hang, and ends it when it does.

A kernel whose CTAs wait for one another for ever blocks its process in the driver: no exception comes and no signal
handler runs. So whatever launches kernels is a process of its own, killed when it has said nothing for too long.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# A process killed in the middle of a kernel stays until the driver has stopped it.
REAP_S = 20.0
# For what a command itself watches, which is in a group of its own, and which only the command can end.
GRACE_S = 2.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended.

    Attributes:
        exit_code: None where it was killed.
        problem: in words, empty if it ended well.
        last_line: of its output.
    """

    exit_code: int | None
    problem: str
    last_line: str


def run_watched(
    command: Sequence[str],
    limit_s: float,
    quiet_s: float,
    echo: Callable[[str], object] = print,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    grace_s: float = GRACE_S,
) -> Outcome:
    """Run a command, handing on its output line by line, for at most ``limit_s``, and ``quiet_s`` without a line.

    Whatever happens, also where ``echo`` or a signal handler raises, neither the command nor what it started in its
    process group is there afterwards: on SIGTERM it has ``grace_s`` to end, and is killed then.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=cwd,
        env=environment,
        process_group=0,
    )
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process, lines), daemon=True).start()
    try:
        return _watch(process, lines, limit_s, quiet_s, echo)
    finally:
        _kill(process, grace_s)


def _watch(
    process: subprocess.Popen[str],
    lines: queue.Queue[str | None],
    limit_s: float,
    quiet_s: float,
    echo: Callable[[str], object],
) -> Outcome:
    """How it ended; without an exit code it may still be there."""
    end, last = time.monotonic() + limit_s, ""
    while (left := end - time.monotonic()) > 0:
        try:
            line = lines.get(timeout=min(quiet_s, left))
        except queue.Empty:
            if quiet_s < left:
                return Outcome(None, f"no output for {quiet_s:.0f} s", last)
            continue
        if line is None:
            return _end(process, last)
        last = line.strip() or last
        echo(line)
    return Outcome(None, f"not done in {limit_s:.0f} s", last)


def _end(process: subprocess.Popen[str], last: str) -> Outcome:
    try:
        code = process.wait(REAP_S)
    except subprocess.TimeoutExpired:
        return Outcome(None, "closed its output but did not end", last)
    if code < 0:
        return Outcome(code, f"ended by {signal.Signals(-code).name}", last)
    return Outcome(code, f"exit code {code}" if code else "", last)


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    with suppress(ValueError):  # closed by a kill
        for line in process.stdout or ():
            lines.put(line.rstrip("\n"))
    lines.put(None)


def _kill(process: subprocess.Popen[str], grace_s: float) -> None:
    """End the command's process group, or what an ended command has left of it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # the driver still holds it; what comes next finds out
        process.wait(REAP_S)
