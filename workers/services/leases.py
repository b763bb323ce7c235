"""Which requests are under way on this worker, whether new ones are taken, and cleanup that nothing interrupts."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import grpc.aio

from ...runtime.errors import DeadlineExceededError, FuselineError, UnavailableError

logger = logging.getLogger(__name__)


class Leases:
    """One per open stream of a request. Lives on the event loop.

    Attributes:
        is_draining: no new request is admitted.
        num_held: leases given out and not returned; a lease is returned when its cleanup is done.
        num_provenance_failures: handoffs refused because the KV was not what it claimed to be.
    """

    def __init__(self) -> None:
        self.is_draining = False
        self.num_held = 0
        self.num_provenance_failures = 0
        self._none_left = asyncio.Event()
        self._none_left.set()
        self._cleanups: set[asyncio.Task[None]] = set()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Around everything that is done for one request.

        Raises:
            UnavailableError: the worker is draining.
        """
        if self.is_draining:
            raise UnavailableError("the worker is draining")
        self.num_held += 1
        self._none_left.clear()
        try:
            yield
        finally:
            self.num_held -= 1
            if self.num_held == 0:
                self._none_left.set()

    async def drained(self, timeout_s: float) -> int:
        """Wait until no request is under way, at most so long; returns how many are left."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._none_left.wait()
        return self.num_held

    async def clean_up(self, cleanup: Coroutine[Any, Any, None]) -> None:
        """Run a cleanup to its end, also when whoever waits for it is cancelled (again).

        A cleanup that fails is logged: there is nobody left to tell.
        """
        task = asyncio.create_task(_logged(cleanup))
        self._cleanups.add(task)
        task.add_done_callback(self._cleanups.discard)
        await asyncio.shield(task)

    async def cleaned_up(self, timeout_s: float) -> None:
        """Wait for cleanups that outlived their handlers, at most so long."""
        if self._cleanups:
            await asyncio.wait(self._cleanups, timeout=timeout_s)


async def _logged(cleanup: Coroutine[Any, Any, None]) -> None:
    try:
        await cleanup
    except FuselineError as error:
        logger.warning("a cleanup failed: %s", error)
    except Exception:
        logger.exception("a cleanup failed")


def deadline_of(context: grpc.aio.ServicerContext[Any, Any]) -> float | None:
    """The call's deadline on the monotonic clock, None if it has none.

    Raises:
        DeadlineExceededError: it has passed.
    """
    time_left: float | None = context.time_remaining()
    if time_left is None:
        return None
    if time_left <= 0:
        raise DeadlineExceededError("the deadline passed before the request reached the worker")
    return time.monotonic() + time_left
