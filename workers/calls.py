"""Calls that go to all ranks of a group and are answered one by one."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..runtime.errors import FuselineError
from ..runtime.handoff import TransferSummary
from .rank_protocol import CallAnswer, CallFailed, HandoffDone, error_of

Result = TypeVar("Result")
Combine = Callable[[list[CallAnswer]], Any]


@dataclass(slots=True)
class _Pending:
    future: Future[Any]
    num_ranks: int
    combine: Combine
    answers: dict[int, CallAnswer] = field(default_factory=dict)


class CallBook:
    """Calls under way. Thread-safe. Whoever waits bounds the wait; a failure of the group ends all of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ids = itertools.count()
        self._pending: dict[int, _Pending] = {}
        self._failure: FuselineError | None = None

    def open(self, num_ranks: int, combine: Callable[[list[CallAnswer]], Result]) -> tuple[int, Future[Result]]:
        """A call to so many ranks: its id, and the future of what ``combine`` makes of the answers in rank order.

        When a rank has failed the call, the future fails with that error once all have answered.
        """
        future: Future[Result] = Future()
        future.set_running_or_notify_cancel()  # so that nobody cancels it under the answers' feet
        with self._lock:
            call_id = next(self._ids)
            failure = self._failure
            if failure is None:
                self._pending[call_id] = _Pending(future, num_ranks, combine)
        if failure is not None:
            future.set_exception(failure)
        return call_id, future

    def answered(self, rank: int, answer: CallAnswer) -> None:
        """A rank has answered; answers to calls that are not under way are ignored."""
        with self._lock:
            pending = self._pending.get(answer.call_id)
            if pending is None:
                return
            pending.answers[rank] = answer
            if len(pending.answers) < pending.num_ranks:
                return
            del self._pending[answer.call_id]
        answers = [pending.answers[rank] for rank in sorted(pending.answers)]
        failed = [(rank, found) for rank, found in pending.answers.items() if isinstance(found, CallFailed)]
        if failed:
            first_rank, first = min(failed, key=lambda item: item[0])
            pending.future.set_exception(error_of(first.failure, f"rank {first_rank}"))
        else:
            pending.future.set_result(pending.combine(answers))

    def fail(self, error: FuselineError) -> None:
        """The group is lost: every call under way, and every later one, fails with ``error``."""
        with self._lock:
            self._failure = self._failure or error
            lost = list(self._pending.values())
            self._pending.clear()
        for pending in lost:
            pending.future.set_exception(error)


def nothing(_: list[CallAnswer]) -> None:
    """Combines answers that say nothing but "done"."""


def total_summary(answers: list[CallAnswer]) -> TransferSummary:
    """One summary of all ranks' transfers: bytes added, the longest time, every transport that was used."""
    summaries = [answer.summary for answer in answers if isinstance(answer, HandoffDone)]
    used = sorted({name for summary in summaries for name in summary.transport.split("+")} - {"none"})
    return TransferSummary(
        num_bytes=sum(summary.num_bytes for summary in summaries),
        transfer_s=max((summary.transfer_s for summary in summaries), default=0.0),
        transport="+".join(used) or "none",
    )
