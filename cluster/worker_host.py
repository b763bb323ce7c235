"""The life of one worker process, whoever started it: load, serve, drain, end. No Ray here.

The worker runs in a thread with an event loop of its own, so that nothing that the surrounding process does in its
loop can hamper serving, and so that code in ``workers/`` never sees what it is embedded in.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from ..runtime.errors import FuselineError, UnavailableError
from ..runtime.role import WorkerRole
from .membership import ReplicaState
from .messages import Loading, ReplicaReport, WorkerSpec

HEARTBEAT_S = 5.0
LOADING_S = 1.0  # while it loads, that often
STOP_GRACE_S = 3.0  # for open streams to end once the worker stops

logger = logging.getLogger(__name__)
T = TypeVar("T")


class HostedWorker(Protocol):
    """What a worker process runs. All methods are called in one event loop, which ``start`` must not block."""

    async def start(self) -> str:
        """Load and begin to serve; returns ``host:port``.

        Raises:
            FuselineError: it cannot, and why.
        """

    async def failed(self) -> str:
        """Wait until it is broken beyond repair (a rank is gone); returns why."""

    async def set_role(self, role: WorkerRole) -> None:
        """Serve another role from now on; also before it serves at all."""

    def load(self) -> int:
        """Requests under way."""

    def loading(self) -> Loading:
        """How far ``start`` is; may come from another thread."""

    def pids(self) -> tuple[int, ...]:
        """One per rank."""

    async def drain(self) -> None:
        """Admit nothing more; returns when nothing is under way."""

    async def stop(self, grace_s: float) -> None:
        """End serving and give everything back; also after a ``start`` that failed or is under way."""


class WorkerHost:
    """Runs a worker and answers for it. Its coroutines may be awaited in any event loop.

    Args:
        make: builds the worker, in the worker's thread: what is imported there does not delay the process's start.
        node: name of the machine, for reports.
    """

    def __init__(self, spec: WorkerSpec, make: Callable[[WorkerSpec], HostedWorker], node: str) -> None:
        self._spec = spec
        self._make = make
        self._node = node
        self._started_at = time.monotonic()
        self._ready_at: float | None = None
        self._role = spec.role
        self._state = ReplicaState.STARTING
        self._reason = ""
        self._address = ""
        self._loading = Loading()
        self._version = 0
        self._worker: HostedWorker | None = None
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        self._stopping = asyncio.Event()
        self._drain_asked = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name=f"worker {spec.worker_id}", daemon=True)

    def start(self) -> None:
        """Begin to load; ``report`` tells how it goes."""
        self._thread.start()

    async def report(self, version: int) -> ReplicaReport:
        """How it is, once its version is not ``version`` or HEARTBEAT_S have passed, while it loads LOADING_S."""
        return await self._call(self._report(version))

    async def set_role(self, role: WorkerRole) -> None:
        """Serve another role from now on."""
        await self._call(self._set_role(role))

    async def drain(self) -> None:
        """Begin to drain; the report says DRAINED when done."""
        await self._call(self._drain())

    async def load(self) -> int:
        """Requests under way."""
        return await self._call(self._load())

    async def stop(self) -> None:
        """End the worker and its thread; bounded by STOP_GRACE_S and what the worker itself adds to it."""
        if self._thread.is_alive():
            await self._call(self._stop())
            await asyncio.to_thread(self._thread.join, 2 * STOP_GRACE_S)

    async def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if not self._thread.is_alive():
            coroutine.close()
            raise UnavailableError(f"worker {self._spec.worker_id} has ended")
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._live())

    async def _live(self) -> None:
        """The whole life. What ends it early is reported; then it waits to be stopped."""
        stopping = asyncio.create_task(self._stopping.wait())
        service = asyncio.create_task(self._serve())
        await asyncio.wait((service, stopping), return_when=asyncio.FIRST_COMPLETED)
        service.cancel()
        await asyncio.wait((service,))
        error = None if service.cancelled() else service.exception()
        if error is not None:
            logger.error("worker %s failed", self._spec.worker_id, exc_info=error)
            reason = error.message if isinstance(error, FuselineError) else f"{type(error).__name__}: {error}"
            self._enter(ReplicaState.FAILED, reason)
        await stopping
        if self._worker is not None:
            await self._worker.stop(STOP_GRACE_S)

    async def _serve(self) -> None:
        """Load, serve, and, once asked to, drain.

        Raises:
            Exception: whatever keeps the worker from it.
        """
        self._worker = worker = self._make(self._spec)
        await worker.set_role(self._role)
        self._address = await worker.start()
        self._ready_at = time.monotonic()
        self._enter(ReplicaState.READY)
        broken = asyncio.create_task(worker.failed())
        try:
            await _unless(broken, self._drain_asked.wait())
            self._enter(ReplicaState.DRAINING)
            await _unless(broken, worker.drain())
            self._enter(ReplicaState.DRAINED)
        finally:
            broken.cancel()

    def _enter(self, state: ReplicaState, reason: str = "") -> None:
        logger.info("worker %s is %s%s", self._spec.worker_id, state, f": {reason}" if reason else "")
        self._state, self._reason = state, reason
        self._note_change()

    def _note_change(self) -> None:
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def _report(self, version: int) -> ReplicaReport:
        if version == self._version:
            is_loading = self._state is ReplicaState.STARTING
            with suppress(TimeoutError):
                async with asyncio.timeout(LOADING_S if is_loading else HEARTBEAT_S):
                    await self._changed.wait()
        now = time.monotonic()
        worker = self._worker
        if worker is not None and (loading := worker.loading()) != self._loading:
            self._loading = loading
            self._note_change()
        return ReplicaReport(
            version=self._version,
            worker_id=self._spec.worker_id,
            slot=self._spec.slot,
            role=self._role,
            state=self._state,
            num_restarts=self._spec.num_restarts,
            age_s=now - self._started_at,
            ready_age_s=None if self._ready_at is None else now - self._ready_at,
            address=self._address,
            node=self._node,
            pids=() if worker is None else worker.pids(),
            load=0 if worker is None else worker.load(),
            loading=self._loading,
            reason=self._reason,
        )

    async def _set_role(self, role: WorkerRole) -> None:
        self._role = role
        if self._worker is not None:
            await self._worker.set_role(role)
        self._note_change()

    async def _drain(self) -> None:
        self._drain_asked.set()

    async def _load(self) -> int:
        return 0 if self._worker is None else self._worker.load()

    async def _stop(self) -> None:
        self._stopping.set()


async def _unless(broken: asyncio.Task[str], job: Coroutine[Any, Any, object]) -> None:
    """Wait for ``job``.

    Raises:
        UnavailableError: the worker broke first.
    """
    task = asyncio.create_task(job)
    try:
        await asyncio.wait((task, broken), return_when=asyncio.FIRST_COMPLETED)
        if broken.done():
            raise UnavailableError(broken.result())
        task.result()
    finally:
        task.cancel()
