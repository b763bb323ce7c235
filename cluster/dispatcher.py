"""Where sequences wait for room: routes them in order of priority, then arrival, as workers change.

A sequence that no worker has room for waits here, not in a worker: it holds nothing, and it goes wherever room comes
up first. The head of the queue is never overtaken by one that needs less, so long prompts do not starve.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
from dataclasses import dataclass, field

from ..runtime.errors import FuselineError, ResourceExhaustedError
from .router import BusyError, Router, RoutingQuery
from .worker_pool import Assignment, WorkerPool


@dataclass(order=True, slots=True)
class _Waiter:
    priority: int
    arrival: int
    query: RoutingQuery = field(compare=False)
    assigned: asyncio.Future[Assignment] = field(compare=False)


class WaitedTooLongError(ResourceExhaustedError):
    """No worker had room in time."""


class Dispatcher:
    """Assigns sequences to workers. How many wait at most is bounded by whoever admits them."""

    def __init__(self, pool: WorkerPool, router: Router) -> None:
        self._pool = pool
        self._router = router
        self._waiters: list[_Waiter] = []
        self._arrivals = itertools.count()
        pool.subscribe(self._pump)

    @property
    def num_waiting(self) -> int:
        """Sequences without workers."""
        return len(self._waiters)

    async def dispatch(self, query: RoutingQuery, priority: int, max_wait_s: float) -> Assignment:
        """Wait for room and take it. The caller releases the assignment.

        Raises:
            UnavailableError: no decode worker takes requests.
            WaitedTooLongError: there was no room within ``max_wait_s``.
            ResourceExhaustedError: it can never fit.
        """
        assigned: asyncio.Future[Assignment] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(priority, next(self._arrivals), query, assigned)
        bisect.insort(self._waiters, waiter)
        self._pump()
        try:
            async with asyncio.timeout(max_wait_s):
                return await assigned
        except BaseException as error:
            self._withdraw(waiter)
            if isinstance(error, TimeoutError):
                raise WaitedTooLongError(
                    f"no worker had room within {max_wait_s:g} s", limit=max_wait_s, retry_after_s=1
                ) from None
            raise

    def _pump(self) -> None:
        """Assign from the head of the queue for as long as there is room."""
        while self._waiters:
            waiter = self._waiters[0]
            if waiter.assigned.cancelled():
                del self._waiters[0]
                continue
            try:
                assignment = Assignment(self._pool, self._router.route(waiter.query, self._pool.replicas()))
            except BusyError:
                return
            except FuselineError as error:
                waiter.assigned.set_exception(error)
            else:
                waiter.assigned.set_result(assignment)
            del self._waiters[0]

    def _withdraw(self, waiter: _Waiter) -> None:
        """Take a waiter out that nobody waits for any more, or take back what it has just been given."""
        if waiter in self._waiters:
            self._waiters.remove(waiter)
            self._pump()
        elif not waiter.assigned.cancelled() and waiter.assigned.exception() is None:
            waiter.assigned.result().release()
