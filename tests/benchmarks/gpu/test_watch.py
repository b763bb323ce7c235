"""However a command ends, it ends, and how is told."""

import sys

import pytest

from fuseline.benchmarks.gpu.watch import Outcome, run_watched

HANG = "import signal; print('begun', flush=True); signal.pause()"
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
