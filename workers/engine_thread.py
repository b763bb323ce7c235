"""Runs an engine on a thread of its own and lets an event loop talk to it.

The engine is single-threaded: everything that touches it is a command, run on this thread between two steps. The way
back is one mailbox: results of commands and outputs of steps, in the order in which they happened, so that nothing of
a request can arrive after its end was acknowledged. The mailbox wakes the loop at most once per step.

What bounds it: requests by ``max_live``, commands by a few per request, outputs by the requests' max_tokens. So the
mailbox needs no back-pressure, and a slow reader never slows the engine.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

from ..runtime.engine import Engine
from ..runtime.engine_stats import EngineStats, Reserved
from ..runtime.errors import (
    AlreadyExistsError,
    FuselineError,
    InternalError,
    ResourceExhaustedError,
    UnavailableError,
)
from ..runtime.request import FinishReason, Request, SequenceOutput
from .request_stream import RequestStream

logger = logging.getLogger(__name__)
T = TypeVar("T")

PREDECESSOR_TIMEOUT_S = 1.0  # how long a request waits for an earlier attempt of the same name to be cleaned up
STEP_TIME_WEIGHT = 0.1  # of the newest step in the moving average


class EngineThread:
    """An engine, its thread, and the streams of the requests that are live in it.

    Made and used on one event loop. A method that returns a future has handed its command over when it returns:
    cancelling the wait does not take the command back, so whoever opened a stream closes it, whatever happened in
    between.

    Attributes:
        failure: why the engine can no longer run; None while it can.
        watchers: events that are set when something may have changed: after every step and batch of commands.
        step_time_s: moving average.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_live: int,
        on_failure: Callable[[FuselineError], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Own ``engine`` from now on, and start.

        Args:
            max_live: most streams open at once; one more is refused with ResourceExhaustedError.
            on_failure: called once, on the loop, when the engine can no longer run without having been stopped.
            clock: the one that the engine was built with.
        """
        self.failure: FuselineError | None = None
        self.watchers: set[asyncio.Event] = set()
        self.step_time_s = 0.0
        self._engine = engine
        self._clock = clock
        self._max_live = max_live
        self._on_failure = on_failure
        self._streams: dict[str, RequestStream] = {}
        self._loop = asyncio.get_running_loop()
        self._wake = threading.Condition()  # guards the four below; the engine's thread waits on it
        self._inbox: list[Callable[[], None]] = []
        self._mail: list[Callable[[], None]] = []
        self._is_mail_announced = False
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def num_live(self) -> int:
        """Open streams."""
        return len(self._streams)

    async def stop(self, timeout_s: float) -> None:
        """End the thread after the step it is in; requests that are still live end with UNAVAILABLE.

        Raises:
            InternalError: the step did not end in time; the thread, a daemon, stays behind.
        """
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join, timeout_s)
        if self._thread.is_alive():
            raise InternalError(f"the engine is still in a step after {timeout_s:g} s", limit=timeout_s)

    def notify_watchers(self) -> None:
        """Let everyone who watches look again."""
        for event in self.watchers:
            event.set()

    # -- requests ------------------------------------------------------------------------------------------------

    async def open_stream(self, request_id: str) -> RequestStream:
        """Register a request before the engine hears of it, so that no output can be missed.

        A retry may come while its predecessor is still being cleaned up here; it waits for that.

        Raises:
            AlreadyExistsError: a live request has that id.
            ResourceExhaustedError: too many are live.
            UnavailableError: the engine has failed.
        """
        predecessor = self._streams.get(request_id)
        if predecessor is not None:
            with suppress(TimeoutError):  # then it is refused below
                async with asyncio.timeout(PREDECESSOR_TIMEOUT_S):
                    await predecessor.closed.wait()
        if self.failure is not None:
            raise UnavailableError(f"the engine has failed: {self.failure.message}")
        if request_id in self._streams:
            raise AlreadyExistsError(f"request {request_id!r} is under way already", field="request_id")
        if len(self._streams) >= self._max_live:
            raise ResourceExhaustedError(
                f"{self._max_live} requests are under way, which is the limit", limit=self._max_live
            )
        stream = self._streams[request_id] = RequestStream(request_id)
        return stream

    def add(self, request: Request) -> asyncio.Future[None]:
        """``Engine.add_request``."""
        return self.call(lambda engine: engine.add_request(request))

    def reserve(self, request: Request) -> asyncio.Future[Reserved]:
        """``Engine.reserve``."""
        return self.call(lambda engine: engine.reserve(request))

    def commit(self, request_id: str, first_token_id: int) -> asyncio.Future[None]:
        """``Engine.commit``; an end that it finds goes to the request's stream."""

        def command(engine: Engine) -> None:
            output = engine.commit(request_id, first_token_id)
            if output is not None:
                self._post(partial(self._put, [output]))

        return self.call(command)

    def stats(self) -> asyncio.Future[EngineStats]:
        """``Engine.stats``; waits for the step under way."""
        return self.call(lambda engine: engine.stats())

    def fail(self, error: FuselineError) -> None:
        """Something that the engine cannot live without is gone: end every request with this error."""
        self.call(lambda engine: self._end_all(error))

    def close_stream(self, stream: RequestStream) -> asyncio.Future[None]:
        """End the request if it has not ended, and forget it. No transfer may touch its blocks any more.

        Never raises. Its future is done when the engine holds nothing for the request.
        """

        def command(engine: Engine) -> None:
            engine.release_handoff(stream.request_id)
            engine.abort(stream.request_id)

        closed: asyncio.Future[None] = self._loop.create_future()
        self.call(command).add_done_callback(partial(self._forget, stream, closed))
        return closed

    def call(self, command: Callable[[Engine], T]) -> asyncio.Future[T]:
        """Run ``command`` on the engine's thread before its next step.

        A FuselineError that it raises is the future's; any other exception is a bug, and the engine's end.
        """
        future: asyncio.Future[T] = self._loop.create_future()

        def run() -> None:
            try:
                result = command(self._engine)
            except FuselineError as error:
                self._post(partial(_reject, future, error))
            except Exception as error:
                logger.exception("a command to the engine failed")
                failure = InternalError(f"the engine failed: {error!r}")
                self._end_all(failure)
                self._post(partial(_reject, future, failure))
            else:
                self._post(partial(_resolve, future, result))

        with self._wake:
            if self._is_stopping:
                _reject(future, UnavailableError("the engine has stopped"))
            else:
                self._inbox.append(run)
                self._wake.notify()
        return future

    # -- the engine's thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        is_stopping = False
        while not is_stopping:
            commands, is_stopping = self._wait()
            for command in commands:
                command()
            if self._is_step_due() and not is_stopping:
                self._step()
            else:
                self._post(self.notify_watchers)
        self._end_all(UnavailableError("the engine has stopped"))

    def _wait(self) -> tuple[list[Callable[[], None]], bool]:
        """Commands to run before the next step, as soon as there are any or a step is due; and whether to stop."""
        with self._wake:
            while not self._inbox and not self._is_stopping and not self._is_step_due():
                deadline = None if self._engine.failure is not None else self._engine.next_deadline
                self._wake.wait(None if deadline is None else max(0.0, deadline - self._clock()))
            commands, self._inbox = self._inbox, []
            return commands, self._is_stopping

    def _is_step_due(self) -> bool:
        engine = self._engine
        if engine.failure is not None:
            return False
        if engine.has_unfinished and not engine.is_idle:
            return True
        deadline = engine.next_deadline
        return deadline is not None and deadline <= self._clock()

    def _step(self) -> None:
        start = time.perf_counter()
        try:
            outputs = self._engine.step()
        except Exception as error:
            logger.exception("the engine failed")
            self._end_all(InternalError(f"the engine failed: {error!r}"))
            return
        failure = self._engine.failure
        self._post(partial(self._put, outputs) if failure is None else partial(self._failed, failure, outputs))
        if not self._engine.is_idle:
            elapsed = time.perf_counter() - start
            self.step_time_s += (STEP_TIME_WEIGHT if self.step_time_s else 1.0) * (elapsed - self.step_time_s)

    def _end_all(self, error: FuselineError) -> None:
        """No request is left without an answer, even by an engine whose own books are broken."""
        try:
            self._engine.fail(error)
        except Exception:
            logger.exception("the engine failed while it failed")
        self._post(partial(self._failed, error, []))

    def _post(self, delivery: Callable[[], None]) -> None:
        with self._wake:
            self._mail.append(delivery)
            if self._is_mail_announced:
                return
            self._is_mail_announced = True
        self._loop.call_soon_threadsafe(self._deliver)

    # -- the loop ------------------------------------------------------------------------------------------------

    def _deliver(self) -> None:
        with self._wake:
            mail, self._mail = self._mail, []
            self._is_mail_announced = False
        for delivery in mail:
            delivery()

    def _put(self, outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream.put(output)
        self.notify_watchers()

    def _failed(self, error: FuselineError, last_outputs: list[SequenceOutput]) -> None:
        if self.failure is not None:
            return
        self.failure = error
        self._put(last_outputs)
        for stream in self._streams.values():
            stream.put(
                SequenceOutput(
                    stream.request_id, finish_reason=FinishReason.ERROR, error_code=error.code, error=error.message
                )
            )
        if not self._is_stopping:
            self._on_failure(error)

    def _forget(self, stream: RequestStream, closed: asyncio.Future[None], done: asyncio.Future[None]) -> None:
        done.exception()  # an engine that has failed or stopped holds nothing
        self._streams.pop(stream.request_id, None)
        stream.closed.set()
        _resolve(closed, None)


def _resolve(future: asyncio.Future[T], result: T) -> None:
    if not future.done():  # whoever waited may have been cancelled
        future.set_result(result)


def _reject(future: asyncio.Future[T], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # it may be that nobody waits any more
