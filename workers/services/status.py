"""What a worker tells of itself: snapshots for routers, and draining."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio

from ...proto.fuseline.v1 import worker_pb2, worker_pb2_grpc
from ...runtime.config import EngineConfig
from ...runtime.engine_stats import EngineStats
from ...runtime.errors import UnavailableError
from ...runtime.role import WorkerRole
from ..engine_thread import EngineThread
from ..grpc_errors import answering
from ..wire import ROLE_TO_WIRE
from .leases import Leases

DEFAULT_INTERVAL_S = 0.05
MIN_INTERVAL_S = 0.01
MAX_INTERVAL_S = 1.0
MAX_DRAIN_S = 3600.0  # of a drain whose caller set no deadline
ANSWER_MARGIN_S = 0.2  # before the caller's deadline, so that the answer arrives

Context = grpc.aio.ServicerContext[Any, Any]


class WorkerServicer(worker_pb2_grpc.WorkerServicer):
    """``Worker``.

    Args:
        drain: called with the most seconds to wait; returns how many requests are left.

    Attributes:
        role: as routers are told it.
    """

    def __init__(
        self,
        worker_id: str,
        role: WorkerRole,
        config: EngineConfig,
        engine: EngineThread,
        leases: Leases,
        drain: Callable[[float], Awaitable[int]],
    ) -> None:
        self._worker_id = worker_id
        self.role = role
        self._config = config
        self._engine = engine
        self._leases = leases
        self._drain = drain
        self._stats: EngineStats | None = None
        self._asked: asyncio.Future[EngineStats] | None = None  # shared by all who watch

    async def Watch(self, message: worker_pb2.WatchRequest, context: Context) -> None:
        """See worker.proto. Ends with UNAVAILABLE when the engine has failed."""
        interval_s = message.min_interval_ms / 1000 if message.min_interval_ms else DEFAULT_INTERVAL_S
        interval_s = min(max(interval_s, MIN_INTERVAL_S), MAX_INTERVAL_S)
        changed = asyncio.Event()
        self._engine.watchers.add(changed)
        try:
            async with answering(context):
                await self._watch(interval_s, changed, context)
        finally:
            self._engine.watchers.discard(changed)

    async def Drain(self, message: worker_pb2.DrainWorkerRequest, context: Context) -> worker_pb2.DrainWorkerResponse:
        """See worker.proto. Draining goes on, and stays, when the call ends before."""
        time_left: float | None = context.time_remaining()
        wait_s = MAX_DRAIN_S if time_left is None else max(0.0, time_left - ANSWER_MARGIN_S)
        return worker_pb2.DrainWorkerResponse(num_left=await self._drain(wait_s))

    async def _watch(self, interval_s: float, changed: asyncio.Event, context: Context) -> None:
        last = await self._snapshot(None)
        while True:
            await context.write(last)
            due_at = time.monotonic() + MAX_INTERVAL_S
            latest = last
            while latest == last and time.monotonic() < due_at:
                await asyncio.sleep(interval_s)
                await _wait(changed, due_at - time.monotonic())
                changed.clear()
                latest = await self._snapshot(max(interval_s, due_at - time.monotonic()))
            last = latest

    async def _snapshot(self, patience_s: float | None) -> worker_pb2.WorkerSnapshot:
        """How things are, or were when the engine last had time to say so, if it takes longer than ``patience_s``.

        Raises:
            UnavailableError: the engine has failed or stopped.
        """
        if self._engine.failure is not None:
            raise UnavailableError(f"the engine has failed: {self._engine.failure.message}")
        if self._asked is None:
            self._asked = self._engine.stats()
        asked = self._asked
        await asyncio.wait({asked}, timeout=None if self._stats is None else patience_s)
        if asked.done():
            self._stats = asked.result()
            self._asked = None if self._asked is asked else self._asked
        if self._stats is None:
            raise UnavailableError("the engine has not said anything yet")
        return self._to_wire(self._stats)

    def _to_wire(self, stats: EngineStats) -> worker_pb2.WorkerSnapshot:
        return worker_pb2.WorkerSnapshot(
            worker_id=self._worker_id,
            role=ROLE_TO_WIRE[self.role],
            draining=self._leases.is_draining,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            num_queued_tokens=stats.num_queued_tokens,
            num_total_blocks=stats.num_total_blocks,
            num_free_blocks=stats.num_free_blocks,
            max_num_seqs=self._config.scheduler.max_num_seqs,
            num_finished=stats.num_finished,
            num_preemptions=stats.num_preemptions,
            num_provenance_failures=self._leases.num_provenance_failures,
            num_generated_tokens=stats.num_generated_tokens,
            num_prefix_cache_hit_tokens=stats.num_prefix_cache_hit_tokens,
            num_prefix_cache_query_tokens=stats.num_prefix_cache_query_tokens,
            cached_prefixes=stats.recent_prefix_hashes,
            step_time_s=self._engine.step_time_s,
            num_leaked_blocks=stats.num_leaked_blocks,
        )


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    """Until the event is set, but no longer."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(max(0.0, timeout_s)):
            await event.wait()
