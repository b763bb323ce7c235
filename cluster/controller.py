"""Holds the target and makes the cluster follow it. No Ray here: processes are the backend's business.

One loop: observe, ``reconcile``, carry out. Beside it one task per replica follows the replica's reports; when its
long poll breaks, the process is gone. Nothing is remembered but the target: after a restart the backend finds the
worker processes again and each says itself what it is.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from ..runtime.errors import DeadlineExceededError, FuselineError, NotFoundError, UnavailableError
from ..runtime.role import WorkerRole
from .cluster_config import ClusterConfig
from .membership import MembershipView, ReplicaState
from .messages import ControllerStatus, ReplicaReport, WorkerSpec
from .placement import Resources, check_room
from .reconcile import (
    POOLS,
    Action,
    Drain,
    Limits,
    Replica,
    SetRole,
    Slot,
    SlotHistory,
    Start,
    Stop,
    Target,
    reconcile,
    retire,
)
from .roster import Member, Roster
from .tasks import watched

CALL_TIMEOUT_S = 10.0  # for a worker to answer a short call
SILENCE_TIMEOUT_S = 30.0  # for a ready worker, which reports at least every worker_host.HEARTBEAT_S
STOP_TIMEOUT_S = 20.0  # for a backend to end a replica's processes

logger = logging.getLogger(__name__)


class ReplicaBackend(Protocol):
    """Makes, reaches and ends worker processes. Every method may raise UnavailableError when a process is gone."""

    async def nodes(self) -> list[Resources]:
        """What each node of the cluster has, in use or not."""

    async def find(self) -> list[str]:
        """Worker ids of the processes that are there: of an earlier life of this controller."""

    async def start(self, spec: WorkerSpec) -> None:
        """Place a worker process; returns when it is accepted, not when it is ready.

        Raises:
            FuselineError: it cannot be placed.
        """

    async def report(self, worker_id: str, version: int) -> ReplicaReport:
        """The worker's report, as soon as its version is not ``version`` or the worker's heartbeat is due."""

    async def set_role(self, worker_id: str, role: WorkerRole) -> None:
        """Let it serve another role."""

    async def drain(self, worker_id: str) -> None:
        """Let it finish what it has; it reports DRAINED when it has."""

    async def load(self, worker_id: str) -> int:
        """Requests under way there."""

    async def stop(self, worker_id: str) -> None:
        """End its processes and give its resources back; done when it returns. Nothing happens if there are none."""


class TargetStore(Protocol):
    """Where the target outlives the controller."""

    def load(self) -> Target | None:
        """The target last saved, if any."""

    def save(self, target: Target) -> None:
        """Keep it."""


class Controller:
    """See the module's text. Lives in one event loop; ``run`` must be running for anything to happen."""

    def __init__(
        self,
        config: ClusterConfig,
        backend: ReplicaBackend,
        store: TargetStore,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._backend = backend
        self._store = store
        self._limits = limits or Limits(config.start_timeout_s, config.drain_timeout_s)
        self._clock = clock
        self._started_at = clock()
        self._target = store.load() or Target(config.prefill.num_replicas, config.decode.num_replicas)
        self._roster = Roster()
        self._found = asyncio.Event()
        self._wake = asyncio.Event()
        self._closed = False
        self._bug: BaseException | None = None
        self._jobs: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Find what is there, then reconcile until ``close``.

        Raises:
            Exception: a bug, in whichever task it showed. A new controller that finds everything again is better than
                one that has lost track of a replica.
        """
        await asyncio.gather(*(self._adopt(worker_id) for worker_id in await self._backend.find()))
        self._found.set()
        while not self._closed:
            self._wake.clear()
            await self._look_at_loads()
            wake_at = self._step()
            timeout = None if wake_at is None else max(wake_at - self._clock(), 0.0)
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._wake.wait()
            if self._bug is not None:
                raise self._bug

    async def close(self) -> None:
        """Stop every replica and end ``run``. Bounded by STOP_TIMEOUT_S."""
        self._closed = True
        for worker_id in list(self._roster.members):
            self._carry_out(Stop(worker_id, "the cluster stops"))
        self._note_change()
        if self._jobs:
            await asyncio.wait(self._jobs, timeout=STOP_TIMEOUT_S)

    @property
    def target(self) -> Target:
        """What should be."""
        return self._target

    async def set_target(self, target: Target) -> None:
        """Want something else from now on; see ``status`` for when it is reached.

        Raises:
            ResourceExhaustedError: the cluster could not hold it; the old target stays.
        """
        check_room(self._config, target, await self._backend.nodes())
        self._store.save(target)
        self._target = target
        self._note_change()

    async def drain(self, worker_id: str, timeout_s: float) -> int:
        """Take a replica out and wait for its end, at most so long. Returns the requests still under way there.

        Raises:
            NotFoundError: there is no such replica.
        """
        await self._found.wait()
        members = self._roster.members
        member = members.get(worker_id)
        if member is None:
            known = ", ".join(sorted(members)) or "none"
            raise NotFoundError(f"there is no replica {worker_id!r}; there are: {known}", worker_id=worker_id)
        if member.replica.counts:
            self._carry_out(retire(member.replica))
            self._note_change()
        end = self._clock() + timeout_s
        while worker_id in members and (left_s := end - self._clock()) > 0:
            await self._roster.changes.wait(self._roster.changes.version, left_s)
        return await self._load(member.replica) if worker_id in members else 0

    async def watch(self, version: int, timeout_s: float) -> MembershipView:
        """The replicas, as soon as their version is not ``version`` or the time is up.

        Raises:
            DeadlineExceededError: the replicas are still being looked for.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._found.wait()
        except TimeoutError as error:
            raise DeadlineExceededError("the controller is still looking for its replicas") from error
        await self._roster.changes.wait(version, timeout_s)
        return self._roster.view()

    async def status(self, version: int = -1, timeout_s: float = 0.0) -> ControllerStatus:
        """The status, as soon as its version is not ``version`` or the time is up."""
        await self._roster.changes.wait(version, timeout_s)
        return self._roster.status(self._config, self._target, self._limits, self._clock(), self._started_at)

    def _note_change(self) -> None:
        self._roster.changes.note()
        self._wake.set()

    async def _look_at_loads(self) -> None:
        """Ask for the loads of a pool that is about to shrink: they decide who goes."""
        for pool in POOLS:
            live = [item for item in self._roster.replicas() if item.slot.pool is pool and item.counts]
            if len(live) <= self._target.size(pool):
                continue
            loads = await asyncio.gather(*(self._load(item) for item in live))
            for item, load in zip(live, loads, strict=True):
                member = self._roster.members.get(item.worker_id)
                if member is not None:
                    member.replica = replace(member.replica, load=load)

    async def _load(self, replica: Replica) -> int:
        with suppress(UnavailableError, TimeoutError):
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return await self._backend.load(replica.worker_id)
        return replica.load

    def _step(self) -> float | None:
        """Reconcile once; returns when to do so again at the latest."""
        if self._closed:
            return None
        roster = self._roster
        decision = reconcile(self._target, roster.replicas(), roster.histories, self._clock(), self._limits)
        changed = bool(decision.actions) or roster.waiting != decision.waiting
        roster.histories, roster.waiting = decision.histories, decision.waiting
        for action in decision.actions:
            self._carry_out(action)
        if changed:
            roster.changes.note()
        return decision.wake_at

    def _carry_out(self, action: Action) -> None:
        """Begin an action and show its effect at once; what goes wrong later comes back as a replica's failure."""
        members = self._roster.members
        match action:
            case Start(slot, role):
                self._start(slot, role)
            case SetRole(worker_id, role):
                members[worker_id].replica = replace(members[worker_id].replica, role=role)
                self._spawn(self._tell(worker_id, self._backend.set_role(worker_id, role)))
            case Drain(worker_id):
                members[worker_id].move(ReplicaState.DRAINING, self._clock())
                self._spawn(self._tell(worker_id, self._backend.drain(worker_id)))
            case Stop(worker_id, reason):
                logger.info("stopping %s: %s", worker_id, reason)
                follower = members.pop(worker_id).follower
                if follower is not None:
                    follower.cancel()
                self._spawn(self._stop(worker_id))

    def _start(self, slot: Slot, role: WorkerRole) -> None:
        members, now = self._roster.members, self._clock()
        worker_id = f"{slot}-{secrets.token_hex(2)}"
        while worker_id in members:
            worker_id = f"{slot}-{secrets.token_hex(2)}"
        logger.info("starting %s as %s", worker_id, role)
        num_restarts = self._roster.histories.get(slot, SlotHistory()).num_restarts
        members[worker_id] = member = Member(
            Replica(worker_id, slot, role, ReplicaState.STARTING, now, now), num_restarts
        )
        spec = WorkerSpec(worker_id, slot, role, num_restarts, self._config)
        member.follower = watched(self._follow(member, self._backend.start(spec)), self._note_bug)

    async def _adopt(self, worker_id: str) -> None:
        """Take in a replica that was there before this controller."""
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                report = await self._backend.report(worker_id, -1)
        except (FuselineError, TimeoutError) as error:
            logger.warning("%s does not answer, ending it: %s", worker_id, error)
            self._spawn(self._stop(worker_id))
            return
        now = self._clock()
        found = Replica(worker_id, report.slot, report.role, ReplicaState.STARTING, now, now - report.age_s)
        member = Member(found, report.num_restarts)
        member.take(report, now)
        self._roster.members[worker_id] = member
        self._roster.histories = {**self._roster.histories, report.slot: SlotHistory(report.num_restarts)}
        member.follower = watched(self._follow(member, None), self._note_bug)
        logger.info("found %s again, %s", worker_id, report.state)

    async def _follow(self, member: Member, start: Awaitable[None] | None) -> None:
        """Start the replica, unless it is there already, and take in its reports until it ends."""
        version = -1
        try:
            if start is not None:
                await start
            while member.replica.state not in (ReplicaState.DRAINED, ReplicaState.FAILED):
                # Reconciliation itself bounds a start; loading may keep a process from answering.
                timeout = None if member.replica.state is ReplicaState.STARTING else SILENCE_TIMEOUT_S
                async with asyncio.timeout(timeout):
                    report = await self._backend.report(member.replica.worker_id, version)
                version = report.version
                if member.take(report, self._clock()):
                    self._note_change()
        except TimeoutError:
            self._lost(member, f"it has been silent for {SILENCE_TIMEOUT_S:g} s")
        except FuselineError as error:
            self._lost(member, error.message)

    def _lost(self, member: Member, reason: str) -> None:
        """A process is gone. That of a draining replica has done nothing that its slot should wait for."""
        state = member.replica.state
        logger.warning("%s is lost while %s: %s", member.replica.worker_id, state, reason)
        gone = ReplicaState.DRAINED if state is ReplicaState.DRAINING else ReplicaState.FAILED
        member.move(gone, self._clock(), reason)
        self._note_change()

    async def _tell(self, worker_id: str, call: Awaitable[None]) -> None:
        """A short call to a replica; one that cannot be told is lost."""
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                await call
        except (FuselineError, TimeoutError) as error:
            member = self._roster.members.get(worker_id)
            if member is not None:
                self._lost(member, f"it cannot be told what to do: {error}")

    async def _stop(self, worker_id: str) -> None:
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._backend.stop(worker_id)
        except (FuselineError, TimeoutError) as error:
            logger.warning("%s could not be ended: %s", worker_id, error)

    def _spawn(self, job: Coroutine[object, object, None]) -> None:
        task = watched(job, self._note_bug)
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)

    def _note_bug(self, error: BaseException) -> None:
        self._bug = error
        self._wake.set()
