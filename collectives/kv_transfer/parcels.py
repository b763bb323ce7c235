"""How parcels leave a prefill rank: inline in the gRPC message, or through shared memory that the message points to.

Both hand out a bounded number of buffers, to be filled with pieces; a buffer comes back when its parcel is answered.
That bounds the bytes in flight, which is all the flow control there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ...proto.fuseline.v1 import kv_transfer_pb2 as pb
from ..segment import Bytes, OwnedSegment
from .pieces import Piece
from .wire import encode_parcel


class ParcelBuffers(Protocol):
    """Buffers of one stream. Not thread-safe: the stream's lock guards all calls but ``encode``.

    Attributes:
        name: of the transport, for reports: "shm" or "grpc".
    """

    name: str

    def take(self) -> tuple[int, Bytes] | None:
        """A free buffer and the slot to give back, or None when all are in flight."""

    def give_back(self, slot: int) -> None:
        """The parcel in this slot is answered."""

    def encode(self, parcel_id: int, pieces: Sequence[Piece], slot: int, num_bytes: int) -> bytes:
        """The request that carries the first ``num_bytes`` of the slot's buffer."""


class InlineBuffers:
    """Parcels inside the messages. One buffer is enough: ``encode`` copies it; the slots only count."""

    name = "grpc"

    def __init__(self, parcel_bytes: int, num_parcels: int) -> None:
        self._buffer = np.empty(parcel_bytes, np.uint8)
        self._free = list(range(num_parcels))

    def take(self) -> tuple[int, Bytes] | None:
        """See ``ParcelBuffers``."""
        return (self._free.pop(), self._buffer) if self._free else None

    def give_back(self, slot: int) -> None:
        """See ``ParcelBuffers``."""
        self._free.append(slot)

    def encode(self, parcel_id: int, pieces: Sequence[Piece], slot: int, num_bytes: int) -> bytes:
        """See ``ParcelBuffers``."""
        return encode_parcel(parcel_id, pieces, self._buffer[:num_bytes])


class SharedBuffers:
    """Parcels in a segment; the slots are parts of it."""

    name = "shm"

    def __init__(self, segment: Bytes, parcel_bytes: int, num_parcels: int) -> None:
        self._data = segment
        self._parcel_bytes = parcel_bytes
        self._free = list(reversed(range(num_parcels)))

    def take(self) -> tuple[int, Bytes] | None:
        """See ``ParcelBuffers``."""
        if not self._free:
            return None
        slot = self._free.pop()
        return slot, self._data[slot * self._parcel_bytes : (slot + 1) * self._parcel_bytes]

    def give_back(self, slot: int) -> None:
        """See ``ParcelBuffers``."""
        self._free.append(slot)

    def encode(self, parcel_id: int, pieces: Sequence[Piece], slot: int, num_bytes: int) -> bytes:
        """See ``ParcelBuffers``."""
        return encode_parcel(parcel_id, pieces, slot * self._parcel_bytes)


def attach_request(segment: OwnedSegment) -> bytes:
    """The first request of a stream that offers a segment."""
    offer = pb.AttachSegment(pid=segment.pid, fd=segment.fd, name=segment.name, num_bytes=len(segment.data))
    return pb.PushRequest(attach=offer).SerializeToString()
