"""The gateway's view of its workers: a channel to each, what it last said of itself, and what it cannot know yet.

Membership says who is there; each worker's ``Watch`` stream says how it is. A worker counts only while its watch is
alive: a watch that breaks, or is silent too long, takes the worker out at once, and it is tried again for as long as
membership names it.

A snapshot is always a little old. What this gateway has assigned since is kept here as *pending* and added to the
snapshot until a later one must include it::

    prompt tokens   assigned --------------> 2 snapshots later   the first may have been on its way
    decode blocks   assigned --> reserved ---> 1 later           or 2, as above, for local prefill
    decode load     assigned --> decoding ---> 1 later           likewise; a reservation is no load yet
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from ..proto.fuseline.v1 import worker_pb2, worker_pb2_grpc
from ..runtime.errors import UnavailableError
from ..runtime.role import WorkerRole
from ..workers.grpc_options import CHANNEL_OPTIONS
from .membership import Membership, MembershipView, ReplicaInfo, ReplicaState
from .router import ReplicaSnapshot, RoutingDecision
from .status import KNOWN_ROLES, role_from_wire
from .tasks import watched

logger = logging.getLogger(__name__)

# A worker speaks at least every second; a busy machine may delay it.
MAX_SILENCE_S = 10.0
RECONNECT_DELAY_S = 0.2
MAX_RECONNECT_DELAY_S = 5.0


@dataclass(eq=False, slots=True)
class _Pending:
    """Work assigned to a worker. ``visible_at``: the count of snapshots from which on they include it."""

    num_tokens: int
    num_blocks: int
    num_seqs: int
    visible_at: int | None


@dataclass(eq=False, slots=True)
class _Worker:
    """One worker that membership names."""

    info: ReplicaInfo
    channel: grpc.aio.Channel
    prefill: Any
    decode: Any
    watch: Any
    snapshot: worker_pb2.WorkerSnapshot | None = None
    cached_prefixes: frozenset[int] = frozenset()
    num_snapshots: int = 0
    refused_at: int = -1
    pending: set[_Pending] = field(default_factory=set)
    num_leases: int = 0
    listed: bool = True
    task: asyncio.Task[None] | None = None

    def settle(self) -> None:
        """Forget what the snapshot now includes."""
        self.pending = {p for p in self.pending if p.visible_at is None or p.visible_at > self.num_snapshots}


class Assignment:
    """A sequence's hold on its workers: their channels stay open, and their load is known, until ``release``."""

    def __init__(self, pool: WorkerPool, decision: RoutingDecision) -> None:
        self.decision = decision
        self._pool = pool
        self._decoder = pool.hold(decision.decode_worker)
        self._prefiller: _Worker | None = None
        if decision.prefill_worker is not None:
            try:
                self._prefiller = pool.hold(decision.prefill_worker)
            except UnavailableError:
                pool.let_go(self._decoder)
                raise
        at_work = self._prefiller or self._decoder
        soon = at_work.num_snapshots + 2
        self._prompt = _Pending(decision.num_prefill_tokens, 0, 0, soon)
        self._blocks = _Pending(0, decision.num_decode_blocks, 0, None if self._prefiller else soon)
        self._seq = _Pending(0, 0, 1, None if self._prefiller else soon)
        at_work.pending.add(self._prompt)
        self._decoder.pending.update((self._blocks, self._seq))

    @property
    def decode(self) -> Any:
        """Stub of the decode worker's ``DecodeService``."""
        return self._decoder.decode

    @property
    def prefill(self) -> Any:
        """Stub of the prefill worker's ``PrefillService``.

        Raises:
            UnavailableError: the decision names no prefill worker.
        """
        if self._prefiller is None:
            raise UnavailableError("the sequence has no prefill worker")
        return self._prefiller.prefill

    def reserved(self) -> None:
        """The decode worker has reserved blocks: its next snapshot shows that."""
        self._blocks.visible_at = self._decoder.num_snapshots + 1

    def refused(self) -> None:
        """The decode worker had no room after all: believe that until its next snapshot."""
        self._decoder.refused_at = self._decoder.num_snapshots

    def prefilled(self) -> None:
        """The prompt is computed."""
        (self._prefiller or self._decoder).pending.discard(self._prompt)

    def decoding(self) -> None:
        """The sequence runs on the decode worker: its next snapshot shows it."""
        self._seq.visible_at = self._decoder.num_snapshots + 1

    def release(self) -> None:
        """The sequence has left both workers. Call it once."""
        self.prefilled()
        self._decoder.pending -= {self._blocks, self._seq}
        self._pool.let_go(self._decoder)
        if self._prefiller is not None:
            self._pool.let_go(self._prefiller)
        self._pool.announce()


class WorkerPool:
    """Channels and snapshots of all workers. Lives on one event loop.

    Args:
        membership: says which workers there are.
    """

    def __init__(self, membership: Membership) -> None:
        self._listeners: list[Callable[[], None]] = []
        self._membership = membership
        self._workers: dict[str, _Worker] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None
        self._failed = asyncio.Event()

    def start(self) -> None:
        """Begin to follow membership, in the running loop."""
        self._task = watched(self._follow(), self.note_failure)

    async def failed(self) -> BaseException:
        """Wait until the pool can no longer follow its workers, by a bug; returns what happened."""
        await self._failed.wait()
        return self._failure or RuntimeError("the pool has failed")

    def note_failure(self, error: BaseException) -> None:
        """Take a bug in whatever follows the workers, here or in who listens, as the pool's own."""
        logger.error("the gateway can no longer follow its workers, or tell of them", exc_info=error)
        self._failure = self._failure or error
        self._failed.set()

    async def close(self) -> None:
        """Stop following and close all channels; calls still open on them are cancelled."""
        tasks = [worker.task for worker in self._workers.values()] + [self._task]
        for task in tasks:
            if task is not None:
                task.cancel()
        await asyncio.gather(*(task for task in tasks if task is not None), *self._closing, return_exceptions=True)
        for worker in self._workers.values():
            await worker.channel.close(None)
        self._workers.clear()

    def replicas(self) -> list[ReplicaSnapshot]:
        """Every worker that can be reached, with its pending work added; draining ones are marked so."""
        return [snapshot for worker in self._workers.values() if (snapshot := _snapshot_of(worker)) is not None]

    def snapshots(self) -> dict[str, worker_pb2.WorkerSnapshot]:
        """What each worker that can be reached last said of itself, by worker id."""
        return {name: worker.snapshot for name, worker in self._workers.items() if worker.snapshot is not None}

    def has_ready(self, *roles: WorkerRole) -> bool:
        """Whether a worker of one of ``roles`` takes requests."""
        return any(r.role in roles and not r.draining for r in self.replicas())

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` after every change, for as long as the pool lives."""
        self._listeners.append(listener)

    def hold(self, worker_id: str) -> _Worker:
        """Keep a worker's channel open until ``let_go``.

        Raises:
            UnavailableError: it is gone.
        """
        worker = self._workers.get(worker_id)
        if worker is None or worker.snapshot is None:
            raise UnavailableError(f"worker {worker_id} is gone", worker_id=worker_id)
        worker.num_leases += 1
        return worker

    def let_go(self, worker: _Worker) -> None:
        """The inverse of ``hold``; a worker that membership has dropped is closed with its last hold."""
        worker.num_leases -= 1
        self._close_if_unused(worker)

    def announce(self) -> None:
        """Tell the listeners that something changed."""
        for listener in self._listeners:
            listener()

    async def _follow(self) -> None:
        async for view in self._membership.watch():
            self._apply(view)

    def _apply(self, view: MembershipView) -> None:
        named = {info.worker_id: info for info in view.replicas if info.address and info.state in _REACHABLE}
        for worker_id, info in named.items():
            known = self._workers.get(worker_id)
            if known is None:
                self._workers[worker_id] = worker = _connect(info)
                worker.task = watched(self._watch(worker), self.note_failure)
            else:
                known.info = info
        for worker_id in self._workers.keys() - named.keys():
            worker = self._workers.pop(worker_id)
            worker.listed, worker.snapshot = False, None
            if worker.task is not None:
                worker.task.cancel()
            self._close_if_unused(worker)
        self.announce()

    async def _watch(self, worker: _Worker) -> None:
        """Keep the worker's snapshot current for as long as it is listed."""
        delay = RECONNECT_DELAY_S
        while True:
            call = worker.watch(worker_pb2.WatchRequest())
            try:
                async with asyncio.timeout(MAX_SILENCE_S) as silence:
                    async for snapshot in call:
                        silence.reschedule(asyncio.get_running_loop().time() + MAX_SILENCE_S)
                        self._learn(worker, snapshot)
                        delay = RECONNECT_DELAY_S
            except (grpc.RpcError, TimeoutError, UnavailableError) as error:
                reason = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error) or "silent"
                logger.info("lost sight of worker %s: %s", worker.info.worker_id, reason)
            finally:
                call.cancel()
            if worker.snapshot is not None:
                worker.snapshot = None
                self.announce()
            await asyncio.sleep(delay)
            delay = min(2 * delay, MAX_RECONNECT_DELAY_S)

    def _learn(self, worker: _Worker, snapshot: worker_pb2.WorkerSnapshot) -> None:
        if snapshot.role not in KNOWN_ROLES:
            raise UnavailableError(f"it has role {snapshot.role}, which this gateway does not know")
        if worker.snapshot is None or list(worker.snapshot.cached_prefixes) != list(snapshot.cached_prefixes):
            worker.cached_prefixes = frozenset(snapshot.cached_prefixes)
        worker.snapshot = snapshot
        worker.num_snapshots += 1
        worker.settle()
        self.announce()

    def _close_if_unused(self, worker: _Worker) -> None:
        if not worker.listed and not worker.num_leases:
            closing = asyncio.create_task(worker.channel.close(None))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)


_REACHABLE = (ReplicaState.READY, ReplicaState.DRAINING)


def _connect(info: ReplicaInfo) -> _Worker:
    channel = grpc.aio.insecure_channel(info.address, options=CHANNEL_OPTIONS)
    return _Worker(
        info=info,
        channel=channel,
        prefill=worker_pb2_grpc.PrefillServiceStub(channel),
        decode=worker_pb2_grpc.DecodeServiceStub(channel),
        watch=worker_pb2_grpc.WorkerStub(channel).Watch,
    )


def _snapshot_of(worker: _Worker) -> ReplicaSnapshot | None:
    seen = worker.snapshot
    if seen is None:
        return None
    refused = worker.refused_at == worker.num_snapshots
    num_pending_blocks = sum(p.num_blocks for p in worker.pending)
    return ReplicaSnapshot(
        worker_id=worker.info.worker_id,
        role=role_from_wire(seen.role),
        draining=seen.draining or worker.info.state is not ReplicaState.READY,
        num_running=seen.num_running,
        num_waiting=seen.num_waiting + sum(p.num_seqs for p in worker.pending),
        num_queued_tokens=seen.num_queued_tokens + sum(p.num_tokens for p in worker.pending),
        num_total_blocks=seen.num_total_blocks,
        num_free_blocks=0 if refused else max(0, seen.num_free_blocks - num_pending_blocks),
        max_num_seqs=seen.max_num_seqs,
        cached_prefixes=worker.cached_prefixes,
    )
