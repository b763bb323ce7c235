"""However a command ends, it ends, and how is told."""

import os
import select
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from fuseline.benchmarks.gpu import watch
from fuseline.benchmarks.gpu.watch import Outcome, run_watched

HANG = "import signal; print('begun', flush=True); signal.pause()"
HOLD = "import signal, sys; held = open(sys.argv[1], 'w'); print('begun', flush=True); signal.pause()"
WATCH = """
import sys
from fuseline.benchmarks.gpu.__main__ import end_on_sigterm
from fuseline.benchmarks.gpu.watch import run_watched
end_on_sigterm()
run_watched([sys.executable, "-c", sys.argv[2], sys.argv[1]], 60, 60, lambda line: print(line, flush=True))
"""
CHATTER = "while True: print('more', flush=True)"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print('done')", Outcome(0, "", "done")),
        ("print('done'); print(); raise SystemExit(3)", Outcome(3, "exit code 3", "done")),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", Outcome(-11, "ended by SIGSEGV", "")),
    ],
)
def test_a_command_s_own_end_is_told(code: str, expected: Outcome) -> None:
    assert run_watched([sys.executable, "-c", code], 60, 60) == expected


@pytest.mark.parametrize("ignoring", ["", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);"])
def test_a_command_that_says_nothing_is_killed(ignoring: str) -> None:
    lines: list[str] = []
    ended = run_watched([sys.executable, "-c", ignoring + HANG], 60, 1.5, lines.append)
    assert ended == Outcome(None, "no output for 2 s", "begun")
    assert lines == ["begun"]


def test_a_command_that_goes_on_and_on_is_killed() -> None:
    ended = run_watched([sys.executable, "-c", CHATTER], 0.5, 60, lambda line: None)
    assert ended.exit_code is None
    assert ended.problem == "not done in 0 s"


def test_its_time_ends_however_many_lines_wait_to_be_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def take_10_s(line: str) -> None:
        now[0] += 10

    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now[0]))
    ended = run_watched([sys.executable, "-c", CHATTER], 25, 60, take_10_s)
    assert (ended.problem, now) == ("not done in 25 s", [30.0])


class Held:
    """A named pipe: who holds its writing end, is still there."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = str(path)
        self.reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def let_go(self) -> bool:
        """Whether everybody who held it has ended; waits for it a while."""
        return bool(select.select([self.reader], [], [], 20)[0])


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Held]:
    pipe = Held(tmp_path / "held")
    yield pipe
    os.close(pipe.reader)


def interrupt(line: str) -> None:
    raise KeyboardInterrupt(line)


def test_a_command_does_not_outlive_who_watches_it(held: Held) -> None:
    with pytest.raises(KeyboardInterrupt, match="begun"):
        run_watched([sys.executable, "-c", HOLD, held.path], 60, 60, interrupt)
    assert held.let_go()


def test_what_a_command_watches_does_not_outlive_it(held: Held) -> None:
    """It has a process group of its own: only the command can end it."""
    with pytest.raises(KeyboardInterrupt, match="begun"):
        run_watched([sys.executable, "-c", WATCH, held.path, HOLD], 60, 60, interrupt)
    assert held.let_go()


def test_what_a_command_leaves_behind_is_ended(held: Held) -> None:
    script = 'exec 3>"$0"; sleep 600 >/dev/null 2>&1 & echo done'
    assert run_watched(["sh", "-c", script, held.path], 60, 60) == Outcome(0, "", "done")
    assert held.let_go()
