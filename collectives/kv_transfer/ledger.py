"""What a sender has under way: handoffs, the work they have left, and the one lock that guards all of it.

A handoff ends once: done when it is being finished and no work is left, or failed. It counts as ended only when no
thread reads its blocks any more, since the caller gives them back then. Futures are resolved after the lock is
released, so that their callbacks may call the sender.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from ...runtime.errors import CancelledError, FuselineError
from ...runtime.handoff import KvReservation, TransferSummary
from ...runtime.sharding import KvRange
from .cache_access import BlockIds, Ready
from .intervals import IntervalSet
from .pieces import provenance_digest

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class TransferLimits:
    """Bounds of a sender.

    Attributes:
        inline_parcel_bytes, num_inline_parcels: message size and messages in flight, per destination over gRPC.
        shared_parcel_bytes, num_shared_parcels: the same through shared memory; their product is the segment.
        max_handoffs: open at once.
        max_lanes: destinations connected at once.
        max_queued: token ranges that wait per destination; beyond it ``push`` leaves the range to ``finish``.
        max_retries: how often a piece that came corrupted is sent again.
        ack_timeout_s: a destination that leaves a parcel unanswered for longer is given up.
        idle_s: a connection without handoffs is closed after it.
    """

    inline_parcel_bytes: int = 2 * MIB
    num_inline_parcels: int = 8
    shared_parcel_bytes: int = 8 * MIB
    num_shared_parcels: int = 3
    max_handoffs: int = 4096
    max_lanes: int = 256
    max_queued: int = 65536
    max_retries: int = 3
    ack_timeout_s: float = 30.0
    idle_s: float = 60.0


@dataclass(frozen=True, slots=True)
class KvSenderStats:
    """Counters since the start, and what is open now.

    Attributes:
        num_deferred: ranges whose queue was full when they were pushed; sent by ``finish``.
        num_retries: pieces sent again because they came corrupted.
        num_finished, num_failed, num_cancelled: handoffs, by their end.
    """

    num_open: int = 0
    num_lanes: int = 0
    num_pieces: int = 0
    num_bytes: int = 0
    num_deferred: int = 0
    num_retries: int = 0
    num_finished: int = 0
    num_failed: int = 0
    num_cancelled: int = 0


class Destination(Protocol):
    """What a handoff needs to know of the lanes it goes over. Guarded by the ledger's lock."""

    handoffs: set[Outgoing]

    @property
    def is_full(self) -> bool:
        """Whether so much waits already that more should not be queued."""

    def enqueue(self, work: Work) -> None:
        """Send this after what is queued."""


class Outgoing:
    """One handoff on the sending side. Guarded by the ledger's lock.

    Attributes:
        targets: which layers and heads go where.
        pushed: tokens that were handed to the lanes, per layer.
        num_left: pieces and ranges that are not acknowledged yet.
        num_reading: threads that copy from its blocks right now.
    """

    def __init__(self, reservation: KvReservation, block_ids: BlockIds) -> None:
        self.reservation_id = reservation.reservation_id
        self.request_id = reservation.provenance.request_id
        self.epoch = reservation.provenance.epoch
        self.digest = provenance_digest(reservation.provenance)
        self.tokens = (reservation.num_cached_tokens, reservation.provenance.num_tokens)
        self.block_ids = block_ids
        self.targets: tuple[tuple[Destination, KvRange], ...] = ()
        self.pushed: dict[int, IntervalSet] = {}
        self.num_left = 0
        self.num_reading = 0
        self.num_bytes = 0
        self.transports: set[str] = set()
        self.started_at: float | None = None
        self.future: Future[TransferSummary] | None = None
        self.error: FuselineError | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens of one layer that one destination is to get."""

    outgoing: Outgoing
    layer: int
    heads: tuple[int, int]
    tokens: tuple[int, int]
    ready: Ready | None
    num_retries: int = 0

    def of_tokens(self, start: int, end: int) -> Work:
        """The same for a part of the tokens."""
        return Work(self.outgoing, self.layer, self.heads, (start, end), self.ready, self.num_retries)


@dataclass
class Ledger:
    """The lock, the handoffs by reservation id, and the counters."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    handoffs: dict[str, Outgoing] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reading_ended = threading.Condition(self.lock)
        self._resolved: deque[tuple[Future[TransferSummary], TransferSummary | FuselineError]] = deque()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the lock; then, without it, resolve the futures of handoffs that ended meanwhile."""
        with self.lock:
            yield
        while self._resolved:
            try:
                future, outcome = self._resolved.popleft()
            except IndexError:  # another thread was faster
                break
            if isinstance(outcome, FuselineError):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

    def count(self, name: str, by: int = 1) -> None:
        """Add to a counter of ``KvSenderStats``."""
        self.counts[name] = self.counts.get(name, 0) + by

    def fail(self, outgoing: Outgoing, error: FuselineError) -> None:
        """End a handoff without success, unless it ended before."""
        if outgoing.error is None:
            outgoing.error = error
            self.count("num_cancelled" if isinstance(error, CancelledError) else "num_failed")
            self.settle(outgoing)

    def settle(self, outgoing: Outgoing) -> None:
        """End the handoff if nothing is left to wait for; call after every change of its state."""
        if outgoing.num_reading:
            return
        self.reading_ended.notify_all()
        if outgoing.error is None and (outgoing.future is None or outgoing.num_left):
            return
        for destination, _ in outgoing.targets:
            destination.handoffs.discard(outgoing)
        if outgoing.future is None:
            return  # failed; whoever finishes or cancels it takes it off the books
        if self.handoffs.get(outgoing.reservation_id) is outgoing:
            del self.handoffs[outgoing.reservation_id]
            self.count("num_finished", by=outgoing.error is None)
        self._resolved.append((outgoing.future, outgoing.error or _summary(outgoing)))
        outgoing.future = None


def _summary(outgoing: Outgoing) -> TransferSummary:
    transfer_s = 0.0 if outgoing.started_at is None else time.monotonic() - outgoing.started_at
    return TransferSummary(outgoing.num_bytes, transfer_s, "+".join(sorted(outgoing.transports)) or "none")
