import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from fuseline.cluster.processes import Process, descendants, end_all, family, is_alive, wait_ended
from fuseline.tests.timing import PROMPTLY_S

SLEEP = "import time; time.sleep(60)"
# A child that has a child of its own; the name of the process is meant to mislead a careless parser.
MISLEADING = ") S 1 ("
NESTED = (
    "import subprocess, sys;"
    f"print(subprocess.Popen([sys.executable, '-c', {SLEEP!r}, {MISLEADING!r}]).pid, flush=True)"
)


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", f"{NESTED}; {SLEEP}", MISLEADING], stdout=subprocess.PIPE, text=True
    )
    yield process
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def test_children_and_their_children_are_found_and_ended(child: subprocess.Popen[str]) -> None:
    assert child.stdout is not None
    grandchild = int(child.stdout.readline())
    found = descendants(os.getpid())
    assert {child.pid, grandchild} <= {process.pid for process in found}
    both = {process for process in found if process.pid in (child.pid, grandchild)}
    assert wait_ended(both, 0.05) == both
    end_all(both, 0.0)
    assert wait_ended(both, PROMPTLY_S) == set()


def test_a_family_is_known_by_a_word_of_its_elders(child: subprocess.Popen[str]) -> None:
    assert child.stdout is not None
    grandchild = int(child.stdout.readline())
    assert {process.pid for process in family("import subprocess, sys")} == {child.pid, grandchild}
    assert family("no such word") == set()


def test_another_process_with_the_same_id_is_not_the_one_that_was_meant() -> None:
    me = next(process for process in descendants(os.getppid()) if process.pid == os.getpid())
    assert is_alive(me)
    assert not is_alive(Process(me.pid, me.start_ticks - 1))
