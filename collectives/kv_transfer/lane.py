"""One destination of a sender: a Push stream, what waits for it, and what is in flight on it.

Two threads serve a lane: gRPC's own, which asks ``_requests`` for the next message and so gathers pieces from the
cache just before they leave, and a reader of the responses. Only a parcel that fits into a free buffer is gathered,
so a slow destination slows its own lane down and nothing else.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import grpc

from ...proto.fuseline.v1 import kv_transfer_pb2 as pb
from ...runtime.errors import FuselineError, InternalError, ProvenanceError, UnavailableError
from ..segment import Bytes, OwnedSegment
from .cache_access import CacheAccess
from .ledger import Ledger, Outgoing, TransferLimits, Work
from .parcels import InlineBuffers, ParcelBuffers, SharedBuffers, attach_request
from .pieces import Piece, Refusal, checksum
from .servicer import PUSH

WAKE_S = 1.0  # waits look again after this, should a wake-up ever be lost


@dataclass(frozen=True, slots=True)
class _InFlight:
    slot: int
    work: tuple[Work, ...]


class Lane:
    """A connection to the rank at ``address``. Everything mutable is guarded by the ledger's lock.

    Args:
        share_memory: offer a segment first; without it, or when the other side cannot attach it, bytes go inline.
    """

    def __init__(
        self,
        address: str,
        channel: grpc.Channel,
        share_memory: bool,
        cache: CacheAccess,
        ledger: Ledger,
        limits: TransferLimits,
    ) -> None:
        self.address = address
        self.handoffs: set[Outgoing] = set()
        self.error: FuselineError | None = None
        self._cache, self._ledger, self._limits = cache, ledger, limits
        self._share_memory = share_memory
        self._segment: OwnedSegment | None = None
        self._buffers: ParcelBuffers | None = None
        self._queue: deque[Work] = deque()
        self._in_flight: dict[int, _InFlight] = {}
        self._num_parcels = 0
        self._quiet_since = time.monotonic()  # when an answer last came, or nothing was to be answered
        self._changed = threading.Condition(ledger.lock)
        self._channel = channel
        push = channel.stream_stream(PUSH, None, pb.PushResponse.FromString)
        self._call = push(self._requests())
        threading.Thread(target=self._read, name=f"kv-push-{address}", daemon=True).start()

    @property
    def is_idle(self) -> bool:
        """Whether nothing needs the lane. Needs the lock."""
        return not self.handoffs and not self._in_flight

    @property
    def is_full(self) -> bool:
        """Whether so much waits already that more should not be queued. Needs the lock."""
        return len(self._queue) >= self._limits.max_queued

    def quiet_s(self) -> float:
        """For how long nothing has come back, or gone out after a pause. Needs the lock."""
        return time.monotonic() - self._quiet_since

    @property
    def awaits_answer(self) -> bool:
        """Whether the other side owes an answer. Needs the lock."""
        return bool(self._in_flight) or self._buffers is None

    def enqueue(self, work: Work) -> None:
        """Send this after what is queued. Needs the lock."""
        work.outgoing.num_left += 1
        self._queue.append(work)
        self._changed.notify()

    def close(self, error: FuselineError) -> None:
        """Give the lane up: its handoffs fail with ``error``. Idempotent; call it without the lock."""
        with self._ledger.changing():
            if self.error is not None:
                return
            self.error = error
            for outgoing in tuple(self.handoffs):
                self._ledger.fail(outgoing, error)
            self.handoffs.clear()
            self._queue.clear()
            self._in_flight.clear()
            self._changed.notify_all()
        self._call.cancel()  # type: ignore[no-untyped-call]
        self._channel.close()

    def _requests(self) -> Iterator[bytes]:
        """What the stream sends, made just in time; runs on gRPC's thread."""
        try:
            yield from self._open_buffers()
            while (message := self._next_parcel()) is not None:
                yield message
        except (RuntimeError, ValueError) as error:  # what torch and numpy raise: the cache cannot be read
            self.close(InternalError(f"cannot read KV for {self.address}: {error}"))
        finally:
            with self._ledger.lock:
                segment, self._segment, self._buffers = self._segment, None, None
            if segment is not None:
                segment.close()

    def _open_buffers(self) -> Iterator[bytes]:
        limits = self._limits
        if self._share_memory:
            try:
                self._segment = OwnedSegment(
                    self._parcel_bytes(limits.shared_parcel_bytes) * limits.num_shared_parcels
                )
            except UnavailableError:
                self._set_buffers(attached=False)
            else:
                yield attach_request(self._segment)
        else:
            self._set_buffers(attached=False)

    def _set_buffers(self, attached: bool) -> None:
        limits = self._limits
        with self._ledger.lock:
            if attached and self._segment is not None:
                num_bytes = self._parcel_bytes(limits.shared_parcel_bytes)
                self._buffers = SharedBuffers(self._segment.data, num_bytes, limits.num_shared_parcels)
            else:
                num_bytes = self._parcel_bytes(limits.inline_parcel_bytes)
                self._buffers = InlineBuffers(num_bytes, limits.num_inline_parcels)
            self._changed.notify_all()

    def _parcel_bytes(self, at_least: int) -> int:
        one_token = 2 * self._cache.kv_range.num_heads * self._cache.head_bytes
        return max(at_least, one_token)

    def _next_parcel(self) -> bytes | None:
        """Gather what waits, as much as fits into a buffer; None when the lane is closed."""
        while True:
            with self._ledger.lock:
                while self.error is None and not (self._queue and self._buffers is not None):
                    self._changed.wait(WAKE_S)
                if self.error is not None or self._buffers is None:
                    return None
                buffers, taken = self._buffers, self._buffers.take()
                if taken is None:
                    self._changed.wait(WAKE_S)
                    continue
            slot, buffer = taken
            pieces, work = self._fill(buffer)
            with self._ledger.lock:
                if not pieces:
                    buffers.give_back(slot)
                    continue
                parcel_id = self._num_parcels = self._num_parcels + 1
                if not self._in_flight:
                    self._quiet_since = time.monotonic()
                self._in_flight[parcel_id] = _InFlight(slot, tuple(work))
            return buffers.encode(parcel_id, pieces, slot, sum(piece.num_bytes for piece in pieces))

    def _fill(self, buffer: Bytes) -> tuple[list[Piece], list[Work]]:
        pieces: list[Piece] = []
        done: list[Work] = []
        used = 0
        while True:
            with self._ledger.lock:
                work = self._cut(len(buffer) - used, first=not pieces)
            if work is None:
                return pieces, done
            num_bytes = self._num_bytes(work)
            try:
                piece = self._gather(work, buffer[used : used + num_bytes])
            finally:
                with self._ledger.changing():
                    work.outgoing.num_reading -= 1
                    self._ledger.settle(work.outgoing)
            if work.outgoing.error is None:
                pieces.append(piece)
                done.append(work)
                used += num_bytes

    def _cut(self, room: int, first: bool) -> Work | None:
        """The next piece's worth of work, taken off the queue, or None if none waits or too little room is left."""
        while self._queue:
            work = self._queue.popleft()
            if work.outgoing.error is not None:
                continue
            start, end = work.tokens
            per_token = self._num_bytes(work) // (end - start)
            stop = min(end, start + room // per_token)
            if stop < end:
                whole_blocks = stop - stop % self._cache.block_size
                if whole_blocks <= start and not first:
                    self._queue.appendleft(work)
                    return None
                stop = whole_blocks if whole_blocks > start else stop
                work.outgoing.num_left += 1
                self._queue.appendleft(work.of_tokens(stop, end))
            work.outgoing.num_reading += 1
            return work.of_tokens(start, stop)
        return None

    def _gather(self, work: Work, out: Bytes) -> Piece:
        if work.ready is not None:
            work.ready.synchronize()
        self._cache.gather(work.layer, work.heads, work.tokens, work.outgoing.block_ids, out)
        return Piece(
            reservation_id=work.outgoing.reservation_id,
            epoch=work.outgoing.epoch,
            provenance=work.outgoing.digest,
            layer=work.layer,
            head_start=work.heads[0],
            head_end=work.heads[1],
            token_start=work.tokens[0],
            token_end=work.tokens[1],
            num_bytes=len(out),
            checksum=checksum(out),
        )

    def _num_bytes(self, work: Work) -> int:
        heads, tokens = work.heads[1] - work.heads[0], work.tokens[1] - work.tokens[0]
        return 2 * heads * tokens * self._cache.head_bytes

    def _read(self) -> None:
        """Act on responses until the stream ends; runs on a thread of the lane."""
        try:
            for response in self._call:
                self._on_response(response)
            error = UnavailableError(f"{self.address} ended the KV stream", address=self.address)
        except grpc.RpcError:
            reason = f"{self._call.code()}: {self._call.details()}"
            error = UnavailableError(f"the KV stream to {self.address} broke: {reason}", address=self.address)
        self.close(error)

    def _on_response(self, response: pb.PushResponse) -> None:
        if response.HasField("attached"):
            self._set_buffers(response.attached)
            return
        with self._ledger.changing():
            parcel = self._in_flight.pop(response.parcel_id, None)
            if parcel is None or self._buffers is None:
                return  # closed meanwhile
            self._quiet_since = time.monotonic()
            self._buffers.give_back(parcel.slot)
            refused = {refusal.index: refusal for refusal in response.refused}
            for index, work in enumerate(parcel.work):
                if index in refused:
                    self._on_refused(work, Refusal(refused[index].reason), refused[index].message)
                else:
                    self._on_accepted(work)
            self._changed.notify()

    def _on_accepted(self, work: Work) -> None:
        outgoing, num_bytes = work.outgoing, self._num_bytes(work)
        outgoing.num_left -= 1
        outgoing.num_bytes += num_bytes
        if self._buffers is not None:
            outgoing.transports.add(self._buffers.name)
        self._ledger.count("num_pieces")
        self._ledger.count("num_bytes", num_bytes)
        self._ledger.settle(outgoing)

    def _on_refused(self, work: Work, reason: Refusal, message: str) -> None:
        outgoing = work.outgoing
        if reason.worth_retrying and work.num_retries < self._limits.max_retries:
            self._ledger.count("num_retries")
            self._queue.appendleft(replace(work, num_retries=work.num_retries + 1))
            return
        details = {"request_id": outgoing.request_id, "address": self.address, "reason": reason.name}
        if reason is Refusal.LATE:
            error: FuselineError = UnavailableError(f"decode gave up the KV reservation: {message}", **details)
        else:
            error = ProvenanceError(f"decode refused KV: {message}", **details)
        self._ledger.fail(outgoing, error)
