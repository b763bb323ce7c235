"""Runs an engine's plans on all ranks of a group, and notices when one of them is lost.

The first rank lives here; with others beside it, it computes on a thread of its own, so that whoever waits for a step
learns of a dead rank at once, whatever that thread is stuck in. The others are reached by step channels, each with a
reader thread. All of them report into one mailbox, and the first failure reported is the group's for good.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

from ..collectives.step_channel import StepChannel
from ..runtime.errors import FuselineError, InternalError, UnavailableError, make_error
from ..runtime.handoff import KvReservation, Provenance, TransferSummary
from ..runtime.plan import StepPlan, StepResult
from .calls import CallBook, nothing, total_summary
from .launcher import RankProcess
from .rank import Job, RankWorker
from .rank_protocol import (
    AllocateCache,
    Call,
    CallAnswer,
    CallDone,
    CallFailed,
    CancelHandoff,
    CloseReservation,
    FinishHandoff,
    HandoffDone,
    Loading,
    LoadModel,
    OpenReservation,
    RankFailure,
    Shutdown,
    StartHandoff,
    VerifyReservation,
    error_of,
)

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")
Result = TypeVar("Result")
Outbound = LoadModel | AllocateCache | StepPlan | Shutdown | Call
_STOP_TIMEOUT_S = 10.0
_DEATH_S = 0.2


class _Mailbox(Protocol):
    def deliver(self, rank: int, message: object) -> None: ...
    def fail(self, error: FuselineError) -> None: ...


class _Link(Protocol):
    """How the executor reaches a rank."""

    def send(self, message: Outbound) -> None: ...
    def hang_up(self) -> None: ...
    def close(self) -> None: ...


class GroupExecutor:
    """An ``Executor`` over the ranks of one group.

    ``submit``, ``collect`` and ``ask`` belong to one thread. The calls about KV transfer may come from any, return at
    once, and are answered beside the steps; their futures fail with the error of the rank that refused, or of the
    group. How long to wait for them is the caller's business.

    Args:
        first: the rank in this process.
        others: channel and process of every other rank, by rank.
        timeout_s: for a step to come back; a rank that hangs longer is as good as lost.
        on_loading: called, from any thread, with what ranks beyond the first tell of their loading.

    Attributes:
        failed: resolved, from any thread, when the group has become unusable; so an idle owner learns of it as well.
    """

    def __init__(
        self,
        first: RankWorker,
        others: Mapping[int, tuple[StepChannel, RankProcess]],
        timeout_s: float,
        on_loading: Callable[[int, Loading], None],
    ) -> None:
        self.failed: Future[FuselineError] = Future()
        self._timeout_s = timeout_s
        self._on_loading = on_loading
        self._condition = threading.Condition()
        self._answers: dict[int, object] = {}  # guarded by _condition, like the next three
        self._results: deque[StepResult] = deque()
        self._failure: FuselineError | None = None
        self._closed = False
        self._calls = CallBook()
        self._processes = {rank: process for rank, (_, process) in others.items()}
        # Remote ranks first: they should have the plan before this process is busy with it.
        self._links: list[_Link] = [_ChannelLink(rank, channel, self) for rank, (channel, _) in others.items()]
        self._links.append(_LocalLink(first, self) if others else _InlineLink(first, self))

    @property
    def failure(self) -> FuselineError | None:
        """Why the group is unusable, or None."""
        return self._failure

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks beyond the first, as far as they are known."""
        return [process.pid for process in self._processes.values() if process.pid is not None]

    def submit(self, plan: StepPlan) -> None:
        """See ``Executor``."""
        self._send(plan)

    def collect(self) -> StepResult:
        """See ``Executor``."""
        with self._condition:
            self._wait(lambda: bool(self._results), self._timeout_s)
            return self._results.popleft()

    def ask(self, message: LoadModel | AllocateCache, answer_type: type[Answer], timeout_s: float) -> list[Answer]:
        """Send a message to every rank and wait for all answers, in rank order. Not while steps are in flight.

        Raises:
            UnavailableError: a rank is lost, or silent for ``timeout_s``.
            FuselineError: it failed on a rank; the group is unusable.
        """
        self._answers.clear()
        self._send(message)
        with self._condition:
            self._wait(lambda: len(self._answers) == len(self._links), timeout_s)
            answers = [self._answers[rank] for rank in sorted(self._answers)]
        checked = [answer for answer in answers if isinstance(answer, answer_type)]
        if len(checked) != len(answers):
            raise InternalError(f"expected {answer_type.__name__} from every rank, got {answers}")
        return checked

    # --- KV transfer ----------------------------------------------------------------------------------------------

    def open_reservation(self, reservation: KvReservation, block_ids: Sequence[int]) -> Future[None]:
        """Every rank takes pushed KV of the reservation into these blocks, see ``KvReceiver.open``."""
        return self._call(lambda call_id: OpenReservation(call_id, reservation, tuple(block_ids)), nothing)

    def verify_reservation(self, reservation_id: str, provenance: Provenance) -> Future[None]:
        """Done if exactly this KV has arrived in full on every rank, else a ProvenanceError."""
        return self._call(lambda call_id: VerifyReservation(call_id, reservation_id, provenance), nothing)

    def close_reservation(self, reservation_id: str) -> Future[None]:
        """When done, no rank writes into the reservation's blocks any more. Idempotent."""
        return self._call(lambda call_id: CloseReservation(call_id, reservation_id), nothing)

    def start_handoff(self, handoff_id: str, reservation: KvReservation) -> Future[None]:
        """Every rank pushes the KV of the sequence of this name, to be admitted once this is done."""
        return self._call(lambda call_id: StartHandoff(call_id, handoff_id, reservation), nothing)

    def finish_handoff(self, handoff_id: str) -> Future[TransferSummary]:
        """The prompt is computed: done when all KV is acknowledged; ends the handoff. See ``KvSender.finish``."""
        return self._call(lambda call_id: FinishHandoff(call_id, handoff_id), total_summary)

    def cancel_handoff(self, handoff_id: str) -> Future[None]:
        """When done, no rank reads the sequence's blocks for the handoff any more. Idempotent."""
        return self._call(lambda call_id: CancelHandoff(call_id, handoff_id), nothing)

    def _call(self, make: Callable[[int], Call], combine: Callable[[list[CallAnswer]], Result]) -> Future[Result]:
        call_id, future = self._calls.open(len(self._links), combine)
        if not future.done():
            self._send_all(make(call_id))
        return future

    # ----------------------------------------------------------------------------------------------------------------

    def _send(self, message: Outbound) -> None:
        self._raise_failure()
        self._send_all(message)
        self._raise_failure()

    def _send_all(self, message: Outbound) -> None:
        for link in self._links:
            try:
                link.send(message)
            except UnavailableError as error:
                self.fail(error)

    def _wait(self, done: Callable[[], bool], timeout_s: float) -> None:
        """Wait under the condition until ``done()``; raises the failure as soon as there is one."""
        deadline = time.monotonic() + timeout_s
        while not done():
            self._raise_failure()
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                self.fail(UnavailableError(f"the group has not answered for {timeout_s:g} s", limit=timeout_s))
            else:
                self._condition.wait(remaining)

    def _raise_failure(self) -> None:
        failure = self._failure
        if failure is not None:
            raise make_error(failure.code, failure.message, failure.details) from failure
        if self._closed:
            raise UnavailableError("the group is closed")

    # --- reports of the links, from their threads -----------------------------------------------------------------

    def deliver(self, rank: int, message: object) -> None:
        """A rank has something to say."""
        if isinstance(message, RankFailure):
            self.fail(error_of(message, f"rank {rank}"))
            return
        if isinstance(message, CallDone | HandoffDone | CallFailed):
            self._calls.answered(rank, message)
            return
        if isinstance(message, Loading):
            self._on_loading(rank, message)
            return
        with self._condition:
            if isinstance(message, StepResult):
                self._results.append(message)
            else:
                self._answers[rank] = message
            self._condition.notify_all()

    def fail(self, error: FuselineError) -> None:
        """The group is unusable; the first reason given stays. Frees everybody who waits for a peer."""
        with self._condition:
            if self._failure is not None or self._closed:
                return
            if isinstance(error, UnavailableError):
                error = self._explained(error)
            self._failure = error
            self._condition.notify_all()
        logger.error("the group has failed: %s", error)
        self._calls.fail(error)
        for link in self._links:
            link.hang_up()
        self.failed.set_result(error)

    def _explained(self, error: UnavailableError) -> UnavailableError:
        """The same with the ranks that are dead; a process whose sockets are closed may take a moment to be."""
        give_up = time.monotonic() + _DEATH_S
        while self._processes:
            dead = {rank: code for rank, p in self._processes.items() if (code := p.exit_code()) is not None}
            if dead:
                names = ", ".join(f"rank {rank} (exit code {code})" for rank, code in dead.items())
                return UnavailableError(f"{names} is gone: {error.message}", ranks=sorted(dead))
            if time.monotonic() > give_up:
                break
            time.sleep(0.01)
        return error

    def close(self) -> None:
        """End all ranks in order, within some seconds, by force if need be. From any thread, idempotent."""
        with self._condition:
            if self._closed:
                return
            self._closed = True
            orderly = self._failure is None
            self._condition.notify_all()
        self._calls.fail(UnavailableError("the group is closed"))
        if orderly:
            for link in self._links:
                with contextlib.suppress(UnavailableError):
                    link.send(Shutdown())
        deadline = time.monotonic() + (_STOP_TIMEOUT_S if orderly else 1.0)
        for process in self._processes.values():
            process.stop(max(0.0, deadline - time.monotonic()))
        for link in self._links:
            link.close()


class _ChannelLink:
    """A rank in another process."""

    def __init__(self, rank: int, channel: StepChannel, mailbox: _Mailbox) -> None:
        self._rank = rank
        self._channel = channel
        self._mailbox = mailbox
        self._thread = threading.Thread(target=self._read, name=f"rank-{rank}-reader", daemon=True)
        self._thread.start()

    def send(self, message: Outbound) -> None:
        self._channel.send(message)

    def hang_up(self) -> None:
        self._channel.close()

    def close(self) -> None:
        self._channel.close()
        self._thread.join(_STOP_TIMEOUT_S)

    def _read(self) -> None:
        while True:
            try:
                message = self._channel.receive()
            except FuselineError as error:
                self._mailbox.fail(error)
                return
            self._mailbox.deliver(self._rank, message)


class _InlineLink:
    """The only rank: computes in the caller's thread. Calls, which may have to wait for a copy, have their own."""

    def __init__(self, worker: RankWorker, mailbox: _Mailbox) -> None:
        self._worker = worker
        self._mailbox = mailbox
        self._callers = ThreadPoolExecutor(1, thread_name_prefix="rank-0-calls")

    def send(self, message: Outbound) -> None:
        match message:
            case LoadModel() | AllocateCache() | StepPlan():
                self._run(self._worker.accept(message))
            case Shutdown():
                pass
            case _:
                self._call(message)

    def hang_up(self) -> None:
        self._worker.close()

    def close(self) -> None:
        self._worker.close()
        self._callers.shutdown()

    def _run(self, job: Job) -> None:
        try:
            reply = self._worker.compute(job)
        except FuselineError as error:
            self._mailbox.fail(error)
            return
        if reply is not None:
            self._mailbox.deliver(0, reply)

    def _call(self, call: Call) -> None:
        try:
            self._callers.submit(self._worker.call, call, lambda answer: self._mailbox.deliver(0, answer))
        except RuntimeError as error:  # it is shut down
            raise UnavailableError("the group is closed") from error


class _LocalLink(_InlineLink):
    """The first rank beside others: computes on its own thread."""

    def __init__(self, worker: RankWorker, mailbox: _Mailbox) -> None:
        super().__init__(worker, mailbox)
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()  # bounded by the pipeline's depth
        self._thread = threading.Thread(target=self._work, name="rank-0", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._inbox.put(None)
        super().close()
        self._thread.join(_STOP_TIMEOUT_S)

    def _run(self, job: Job) -> None:
        self._inbox.put(job)

    def _work(self) -> None:
        while (job := self._inbox.get()) is not None:
            super()._run(job)
