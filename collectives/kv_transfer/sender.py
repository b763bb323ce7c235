"""The prefill side of a transfer: pushes KV out of this rank's cache to whoever reserved room for it.

Blocks are read by threads after ``push`` has returned, so the caller holds them until the handoff has ended: until
the future of ``finish`` is resolved, or ``cancel`` has returned. Nothing reads them afterwards.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import grpc
import numpy as np
from torch import Tensor

from ...runtime.errors import (
    AlreadyExistsError,
    CancelledError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from ...runtime.handoff import KvReservation, TransferSummary, transfer_ranges
from ...runtime.sharding import KvRange, ModelShape, ParallelConfig, kv_range
from ..segment import host_id
from .cache_access import Ready, cache_access
from .intervals import IntervalSet
from .lane import WAKE_S, Lane
from .ledger import KvSenderStats, Ledger, Outgoing, TransferLimits, Work

Connect = Callable[[str], grpc.Channel]
DEFAULT_LIMITS = TransferLimits()


class KvSender:
    """Pushes KV of one prefill rank. Thread-safe. Close it: it owns threads, connections and shared memory.

    Args:
        kv_cache: ``[num_layers, 2, num_blocks, num_kv_heads, block_size, row_width]``, contiguous: what ``rank`` of
            a group of ``parallel`` holds of a model of ``shape``.
        connect: makes a channel to an address; plain by default, with TLS where a cluster wants it.
    """

    def __init__(
        self,
        kv_cache: Tensor,
        shape: ModelShape,
        parallel: ParallelConfig,
        rank: int,
        limits: TransferLimits = DEFAULT_LIMITS,
        connect: Connect = grpc.insecure_channel,
    ) -> None:
        self._cache = cache_access(kv_cache, kv_range(shape, parallel, rank))
        self._shape, self._parallel, self._rank = shape, parallel, rank
        self._limits = limits
        self._connect = connect
        self._ledger = Ledger()
        self._lanes: dict[str, Lane] = {}  # by address; guarded by the ledger's lock
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="kv-sender", daemon=True)
        self._watcher.start()

    def start(self, reservation: KvReservation, block_ids: Sequence[int]) -> None:
        """Begin a handoff of the sequence that these blocks hold; ``finish`` or ``cancel`` must end it.

        Connects in the background; that a destination cannot be reached is told by ``finish``.

        Raises:
            AlreadyExistsError: it has begun.
            ResourceExhaustedError: too many are open, or too many destinations.
            InvalidArgumentError: blocks or dtype do not fit this cache.
            UnavailableError: the sender is closed.
        """
        blocks = np.asarray(block_ids, np.int64)
        self._check_fits(reservation, block_ids)
        sends = transfer_ranges(self._shape, self._parallel, self._rank, reservation.endpoints)
        outgoing = Outgoing(reservation, blocks)
        with self._ledger.lock:
            if reservation.reservation_id in self._ledger.handoffs:
                raise AlreadyExistsError("the handoff has begun already", request_id=outgoing.request_id)
            if len(self._ledger.handoffs) >= self._limits.max_handoffs:
                limit = self._limits.max_handoffs
                raise ResourceExhaustedError(f"{limit} KV handoffs are open", limit=limit)
            lanes = [self._lane(end.address, end.host_id) for end, _ in sends]
            outgoing.targets = tuple(zip(lanes, (common for _, common in sends), strict=True))
            self._ledger.handoffs[reservation.reservation_id] = outgoing
            for lane in lanes:
                lane.handoffs.add(outgoing)

    def push(self, reservation_id: str, layer: int, token_start: int, token_end: int) -> None:
        """The KV of these tokens of this layer is computed: send it. Never waits, never fails.

        Tokens that decode holds, or that were pushed before, are left out. A handoff that has ended is ignored; its
        fate is told by ``finish``. On a GPU, call it on the stream that computes.
        """
        ready = self._cache.mark_written()
        with self._ledger.lock:
            outgoing = self._ledger.handoffs.get(reservation_id)
            if outgoing is None or outgoing.error is not None:
                return
            if any(lane.is_full for lane, common in outgoing.targets if _holds(common, layer)):
                self._ledger.count("num_deferred")
                return
            self._enqueue(outgoing, layer, (token_start, token_end), ready)

    def finish(self, reservation_id: str) -> Future[TransferSummary]:
        """All KV of the prompt is computed: send what was not pushed yet. Ends the handoff.

        The future is resolved when every piece is acknowledged, or fails with UnavailableError (the decode side is
        gone, or gave the reservation up), ProvenanceError (it refused a piece for good) or CancelledError. It never
        waits for longer than ``ack_timeout_s`` without progress. Its callbacks must not block.

        Raises:
            NotFoundError: there is no such handoff, or it has ended.
        """
        with self._ledger.changing():
            outgoing = self._ledger.handoffs.get(reservation_id)
            if outgoing is None:
                raise NotFoundError("no such KV handoff is open")
            if outgoing.future is None:
                outgoing.future = Future()
            future = outgoing.future
            if outgoing.error is None:
                for layer in range(self._cache.kv_range.layer_start, self._cache.kv_range.layer_end):
                    self._enqueue(outgoing, layer, outgoing.tokens, None)
            self._ledger.settle(outgoing)
        return future

    def cancel(self, reservation_id: str) -> None:
        """End the handoff; idempotent. When it returns, nothing reads its blocks any more. Waits for one copy."""
        with self._ledger.changing():
            outgoing = self._ledger.handoffs.pop(reservation_id, None)
            if outgoing is None:
                return
            self._ledger.fail(outgoing, CancelledError("the KV handoff was cancelled"))
            while outgoing.num_reading:
                if not self._ledger.reading_ended.wait(self._limits.ack_timeout_s):
                    raise InternalError("a copy out of the KV cache does not end", request_id=outgoing.request_id)

    def stats(self) -> KvSenderStats:
        """The counters now."""
        with self._ledger.lock:
            now = {"num_open": len(self._ledger.handoffs), "num_lanes": len(self._lanes)}
            return KvSenderStats(**self._ledger.counts, **now)

    def close(self) -> None:
        """Cancel everything and give threads, connections and memory back; idempotent."""
        self._closed.set()
        with self._ledger.lock:
            lanes, reservation_ids = list(self._lanes.values()), list(self._ledger.handoffs)
            self._lanes.clear()
        for reservation_id in reservation_ids:
            self.cancel(reservation_id)
        for lane in lanes:
            lane.close(UnavailableError("the KV sender is closed"))
        self._watcher.join()

    def _enqueue(self, outgoing: Outgoing, layer: int, tokens: tuple[int, int], ready: Ready | None) -> None:
        pushed = outgoing.pushed.setdefault(layer, IntervalSet())
        start, end = max(tokens[0], outgoing.tokens[0]), min(tokens[1], outgoing.tokens[1])
        for gap in pushed.missing(start, end):
            for lane, common in outgoing.targets:
                if _holds(common, layer):
                    lane.enqueue(Work(outgoing, layer, (common.head_start, common.head_end), gap, ready))
                    outgoing.started_at = outgoing.started_at or time.monotonic()
        pushed.add(start, end)

    def _lane(self, address: str, peer_host_id: str) -> Lane:
        lane = self._lanes.get(address)
        if lane is not None and lane.error is None:
            return lane
        if self._closed.is_set():
            raise UnavailableError("the KV sender is closed")
        if len(self._lanes) >= self._limits.max_lanes:
            limit = self._limits.max_lanes
            raise ResourceExhaustedError(f"KV goes to {limit} destinations already", limit=limit)
        share_memory = peer_host_id == host_id()
        lane = Lane(address, self._connect(address), share_memory, self._cache, self._ledger, self._limits)
        self._lanes[address] = lane
        return lane

    def _check_fits(self, reservation: KvReservation, block_ids: Sequence[int]) -> None:
        cache, provenance = self._cache, reservation.provenance
        if provenance.dtype != cache.dtype:
            raise InvalidArgumentError(f"decode wants KV of {provenance.dtype}, this is {cache.dtype}", field="dtype")
        if len(block_ids) * cache.block_size < provenance.num_tokens:
            raise InvalidArgumentError(f"{len(block_ids)} blocks do not hold {provenance.num_tokens} tokens")
        if not all(0 <= block_id < cache.num_blocks for block_id in block_ids):
            raise InvalidArgumentError(f"block ids reach beyond the pool of {cache.num_blocks}", field="block_ids")

    def _watch(self) -> None:
        """Give up lanes that do not answer, close those that nobody needs; runs on a thread of the sender."""
        while not self._closed.wait(min(WAKE_S, self._limits.ack_timeout_s / 4)):
            with self._ledger.lock:
                gone = [lane for lane in self._lanes.values() if lane.error is not None]
                silent = [
                    lane
                    for lane in self._lanes.values()
                    if lane.awaits_answer and lane.quiet_s() > self._limits.ack_timeout_s
                ]
                idle = [
                    lane for lane in self._lanes.values() if lane.is_idle and lane.quiet_s() > self._limits.idle_s
                ]
                for lane in (*gone, *silent, *idle):
                    self._lanes.pop(lane.address, None)
            for lane in silent:
                lane.close(UnavailableError(f"{lane.address} does not answer", address=lane.address))
            for lane in idle:
                lane.close(UnavailableError(f"the KV stream to {lane.address} was idle", address=lane.address))


def _holds(common: KvRange, layer: int) -> bool:
    return common.layer_start <= layer < common.layer_end
