"""Who is there: what the gateway and router need to know of the replicas, and how they learn of changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from ..runtime.role import WorkerRole


class ReplicaState(StrEnum):
    """Where a replica stands. Only READY ones take new requests; DRAINING ones finish what they have."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DRAINED = "drained"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """One replica as others see it.

    Attributes:
        worker_id: unique for ever: the replacement of a dead replica has another one.
        address: ``host:port`` of its gRPC services; empty while it starts.
    """

    worker_id: str
    role: WorkerRole
    state: ReplicaState
    address: str = ""


@dataclass(frozen=True, slots=True)
class MembershipView:
    """All replicas at one moment. ``version`` differs from that of every other view; it need not grow by one."""

    version: int
    replicas: tuple[ReplicaInfo, ...]


class Membership(Protocol):
    """A source of views. Any number of watchers may listen at a time."""

    def watch(self) -> AsyncIterator[MembershipView]:
        """The present view at once, then the latest one after every change; ends when the cluster is closed.

        Views in between may be skipped. While the source is out of reach nothing is yielded: the last view stands.
        """


class StaticMembership:
    """A membership that its owner states: for workers started by hand, and for tests."""

    def __init__(self, replicas: Iterable[ReplicaInfo] = ()) -> None:
        self._view = MembershipView(0, tuple(replicas))
        self._changed = asyncio.Event()
        self._closed = False

    @property
    def view(self) -> MembershipView:
        """The present view."""
        return self._view

    def set(self, replicas: Iterable[ReplicaInfo]) -> None:
        """State the replicas anew. Must run in the watchers' event loop."""
        self._view = MembershipView(self._view.version + 1, tuple(replicas))
        self._wake()

    def close(self) -> None:
        """End every watch."""
        self._closed = True
        self._wake()

    async def watch(self) -> AsyncIterator[MembershipView]:
        """See ``Membership.watch``."""
        seen = -1
        while not self._closed:
            if self._view.version != seen:
                seen = self._view.version
                yield self._view
            else:
                await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
