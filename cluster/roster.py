"""The replicas that a controller looks after, and the two pictures of them that it gives out. No decisions here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

from .cluster_config import ClusterConfig
from .membership import MembershipView, ReplicaInfo, ReplicaState
from .messages import ControllerStatus, Loading, ReplicaReport, ReplicaRow
from .reconcile import POOLS, Limits, Replica, Slot, SlotHistory, Target

_ORDER = list(ReplicaState)  # states only ever advance


@dataclass(slots=True)
class Changes:
    """A version that can be waited on. It starts at the wall clock, so that it is never one of a former life's."""

    version: int = field(default_factory=lambda: time.time_ns() // 1000)
    _event: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self) -> None:
        """Something changed."""
        self.version += 1
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, version: int, timeout_s: float) -> None:
        """Until the version is another one, or the time is up."""
        if self.version == version:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._event.wait()


@dataclass(slots=True)
class Member:
    """A replica, what is known of its processes, and the task that follows it."""

    replica: Replica
    num_restarts: int
    address: str = ""
    node: str = ""
    pids: tuple[int, ...] = ()
    loading: Loading = Loading()
    follower: asyncio.Task[None] | None = None

    def take(self, report: ReplicaReport, now: float) -> bool:
        """Learn from a report; returns whether it told anything new.

        A state that is behind ours, such as READY of a replica that was told to drain, is old news.
        """
        before = (self.replica, self.address, self.node, self.pids, self.loading)
        self.address, self.node, self.pids, self.loading = report.address, report.node, report.pids, report.loading
        if _ORDER.index(report.state) > _ORDER.index(self.replica.state):
            self.move(report.state, now, report.reason)
        if report.ready_age_s is not None and self.replica.ready_at is None:
            self.replica = replace(self.replica, ready_at=now - report.ready_age_s)
        return before != (self.replica, self.address, self.node, self.pids, self.loading)

    def move(self, state: ReplicaState, now: float, reason: str = "") -> None:
        """Enter a state."""
        self.replica = replace(self.replica, state=state, since=now, reason=reason)


@dataclass(slots=True)
class Roster:
    """The members by worker id, the slots that wait to be filled, and what the slots have been through."""

    members: dict[str, Member] = field(default_factory=dict)
    histories: Mapping[Slot, SlotHistory] = field(default_factory=dict)
    waiting: tuple[Slot, ...] = ()
    changes: Changes = field(default_factory=Changes)

    def replicas(self) -> list[Replica]:
        """What reconciliation looks at."""
        return [member.replica for member in self.members.values()]

    def view(self) -> MembershipView:
        """For gateways."""
        members = sorted(self.members.values(), key=_place)
        infos = (ReplicaInfo(m.replica.worker_id, m.replica.role, m.replica.state, m.address) for m in members)
        return MembershipView(self.changes.version, tuple(infos))

    def status(
        self, config: ClusterConfig, target: Target, limits: Limits, now: float, started_at: float
    ) -> ControllerStatus:
        """For operators."""
        rows = [self._row(member, now) for member in sorted(self.members.values(), key=_place)]
        rows += [self._waiting_row(slot, target, limits, now) for slot in self.waiting]
        failed = [slot for slot in self.waiting if self.histories[slot].is_failed(limits)]
        return ControllerStatus(
            version=self.changes.version,
            config=config,
            target=target,
            replicas=tuple(rows),
            uptime_s=now - started_at,
            reached=self._reaches(target),
            failed=f"{failed[0]}: {self.histories[failed[0]].reason}" if failed else "",
        )

    def _reaches(self, target: Target) -> bool:
        found = sorted((item.slot.pool, item.state, item.role) for item in self.replicas())
        ready = ReplicaState.READY
        wanted = [(pool, ready, target.role(pool)) for pool in POOLS for _ in range(target.size(pool))]
        return found == sorted(wanted)

    def _row(self, member: Member, now: float) -> ReplicaRow:
        replica = member.replica
        history = self.histories.get(replica.slot)
        message = replica.reason
        if replica.state is ReplicaState.STARTING:
            message = "" if member.node else "waits for its process"
            if history is not None and history.reason:
                message = f"replaces one that failed: {history.reason}"
        return ReplicaRow(
            worker_id=replica.worker_id,
            role=replica.role,
            state=replica.state,
            address=member.address,
            node=member.node,
            pids=member.pids,
            num_restarts=member.num_restarts,
            age_s=now - replica.started_at,
            loading=member.loading,
            message=message,
        )

    def _waiting_row(self, slot: Slot, target: Target, limits: Limits, now: float) -> ReplicaRow:
        history = self.histories[slot]
        return ReplicaRow(
            worker_id=str(slot),
            role=target.role(slot.pool),
            state=ReplicaState.FAILED if history.is_failed(limits) else ReplicaState.STARTING,
            address="",
            node="",
            pids=(),
            num_restarts=history.num_restarts,
            age_s=0.0,
            loading=Loading(),
            message=f"failed {history.num_failures} times in a row,"
            f" next try in {max(history.retry_at - now, 0):.0f} s: {history.reason}",
        )


def _place(member: Member) -> tuple[int, int, float]:
    replica = member.replica
    return POOLS.index(replica.slot.pool), replica.slot.index, replica.started_at
