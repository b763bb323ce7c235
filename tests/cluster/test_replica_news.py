"""What is told of replicas: changes at once, bytes now and then, each loss, nothing twice."""

from __future__ import annotations

from fuseline.cluster.membership import ReplicaState
from fuseline.cluster.messages import ControllerStatus, Loading, ReplicaRow
from fuseline.cluster.reconcile import Target
from fuseline.cluster.replica_news import NEWS_S, LossNews, StartNews
from fuseline.runtime.role import WorkerRole
from fuseline.tests.cluster.memory_cluster import CONFIG


def row(
    state: ReplicaState, loading: Loading, message: str = "", num_restarts: int = 0, worker_id: str = "decode-0-ab"
) -> ReplicaRow:
    return ReplicaRow(worker_id, WorkerRole.DECODE, state, "", "", (), num_restarts, 1.0, loading, message)


def status(*rows: ReplicaRow) -> ControllerStatus:
    return ControllerStatus(1, CONFIG, Target(1, 1), rows, 1.0, reached=False, failed="")


def starting(done: int, total: int) -> ReplicaRow:
    return row(ReplicaState.STARTING, Loading(done, total))


def test_bytes_are_told_now_and_then_and_states_at_once() -> None:
    told, gb = StartNews(), 10**9
    assert told.news(status(starting(0, 0), starting(0, 0)), 0.0) == "loading on cpu: 0 of 2 workers ready"
    now = NEWS_S
    reading = status(starting(gb, 4 * gb), starting(2 * gb, 8 * gb))
    line = "loading on cpu: 3.0 of 12.0 GB of weights read, 25 %; 0 of 2 workers ready"
    assert told.news(reading, now) == line
    assert told.news(reading, now + 2 * NEWS_S) == ""
    further = status(starting(2 * gb, 4 * gb), starting(2 * gb, 8 * gb))
    now += 3 * NEWS_S
    assert told.news(further, now).startswith("loading on cpu: 4.0 of 12.0 GB")
    assert told.news(reading, now + NEWS_S / 2) == ""
    ready = status(row(ReplicaState.READY, Loading(4 * gb, 4 * gb)), starting(8_000, 2_000_000))
    assert told.news(ready, now) == "loading on cpu: 0.0 of 2.0 MB of weights read, 0 %; 1 of 2 workers ready"


def test_troubles_are_told_with_what_is_known_of_them() -> None:
    told = StartNews()
    again = row(ReplicaState.STARTING, Loading(), "replaces one that failed: out of memory", num_restarts=1)
    line = told.news(status(again), 0.0)
    assert line == "loading on cpu: 0 of 2 workers ready; decode-0-ab: replaces one that failed: out of memory"


def test_each_loss_is_told_once() -> None:
    told, other = LossNews(), row(ReplicaState.READY, Loading(), worker_id="prefill-0-ab")

    def news(state: ReplicaState, worker_id: str, num_restarts: int, message: str = "") -> list[str]:
        return told.news(status(other, row(state, Loading(), message, num_restarts, worker_id)))

    assert news(ReplicaState.READY, "decode-0-ab", 0) == []
    assert news(ReplicaState.STARTING, "decode-0-ab", 0, "waits for its process") == []
    assert news(ReplicaState.FAILED, "decode-0-ab", 0, "killed") == []
    # What takes its place, and what took its place when that is lost in turn, first as it ends, then as a free slot.
    assert news(ReplicaState.STARTING, "decode-0-cd", 1, "replaces one") == ["decode-0-cd: replaces one"]
    assert news(ReplicaState.READY, "decode-0-cd", 1) == []
    assert news(ReplicaState.FAILED, "decode-0-cd", 1, "killed again") == []
    assert news(ReplicaState.STARTING, "decode-0", 2, "killed again") == ["decode-0: killed again"]
    assert news(ReplicaState.STARTING, "decode-0-ef", 2, "replaces one: killed again") == []
    # A slot that was given up and is used anew.
    assert news(ReplicaState.READY, "decode-0-01", 0) == []
    assert news(ReplicaState.STARTING, "decode-0-23", 1, "replaces one") == ["decode-0-23: replaces one"]
