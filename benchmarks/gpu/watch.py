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
) -> Outcome:
    """Run a command, handing on its output line by line, for at most ``limit_s``, and ``quiet_s`` without a line.

    What the command started and left behind is killed with it.
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
    end, last = time.monotonic() + limit_s, ""
    while True:
        left = end - time.monotonic()
        try:
            line = lines.get(timeout=max(0.0, min(quiet_s, left)))
        except queue.Empty:
            _kill(process)
            problem = f"not done in {limit_s:.0f} s" if left <= quiet_s else f"no output for {quiet_s:.0f} s"
            return Outcome(None, problem, last)
        if line is None:
            return _end(process, last)
        last = line.strip() or last
        echo(line)


def _end(process: subprocess.Popen[str], last: str) -> Outcome:
    try:
        code = process.wait(REAP_S)
    except subprocess.TimeoutExpired:
        _kill(process)
        return Outcome(None, "closed its output but did not end", last)
    if code < 0:
        return Outcome(code, f"ended by {signal.Signals(-code).name}", last)
    return Outcome(code, f"exit code {code}" if code else "", last)


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    with suppress(ValueError):  # closed by a kill
        for line in process.stdout or ():
            lines.put(line.rstrip("\n"))
    lines.put(None)


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # the driver still holds it; what comes next finds out
        process.wait(REAP_S)
