"""Push requests to bytes and back, without the copies that protobuf's classes make of a payload.

The bytes are ordinary protobuf. Since a message's fields may be concatenated, the sender appends the payload as the
last field to what the generated class made of the others; the receiver finds that field and leaves the payload where
it is. At 1 MiB a message each of the four copies saved costs a tenth of the transport's own time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError

from ...proto.fuseline.v1 import kv_transfer_pb2 as pb
from ...runtime.errors import InvalidArgumentError
from ..segment import Bytes
from .pieces import Piece

_INLINE_KEY = (pb.PushRequest.INLINE_FIELD_NUMBER << 3) | 2
_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, slots=True)
class Parcel:
    """Pieces that travel together, and where their bytes are: inline, or at an offset of the stream's segment."""

    parcel_id: int
    pieces: tuple[Piece, ...]
    inline: Bytes | None
    segment_offset: int


def encode_parcel(parcel_id: int, pieces: Sequence[Piece], data: Bytes | int) -> bytes:
    """A ``PushRequest`` with the pieces and either their bytes or the offset where they lie in the segment."""
    request = pb.PushRequest(parcel_id=parcel_id)
    for piece in pieces:
        request.pieces.add(
            reservation_id=piece.reservation_id,
            epoch=piece.epoch,
            provenance=piece.provenance,
            layer=piece.layer,
            head_start=piece.head_start,
            head_end=piece.head_end,
            token_start=piece.token_start,
            token_end=piece.token_end,
            num_bytes=piece.num_bytes,
            checksum=piece.checksum,
        )
    if isinstance(data, int):
        request.segment_offset = data
        return request.SerializeToString()
    return b"".join((request.SerializeToString(), bytes([_INLINE_KEY]), _varint(len(data)), data.data))


def decode_push(message: bytes) -> Parcel | pb.AttachSegment:
    """What a ``PushRequest`` says. The parcel's inline bytes are a view into ``message``.

    Raises:
        InvalidArgumentError: these are not the bytes of a ``PushRequest`` that means anything.
    """
    inline, rest = _split_inline(message)
    try:
        request = pb.PushRequest.FromString(rest)
    except DecodeError as error:
        raise InvalidArgumentError(f"not a PushRequest: {error}") from error
    if request.HasField("attach"):
        return request.attach
    if inline is None and not request.HasField("segment_offset"):
        raise InvalidArgumentError("a PushRequest needs attach, inline data or segment_offset")
    pieces = tuple(
        Piece(
            reservation_id=piece.reservation_id,
            epoch=piece.epoch,
            provenance=piece.provenance,
            layer=piece.layer,
            head_start=piece.head_start,
            head_end=piece.head_end,
            token_start=piece.token_start,
            token_end=piece.token_end,
            num_bytes=piece.num_bytes,
            checksum=piece.checksum,
        )
        for piece in request.pieces
    )
    return Parcel(request.parcel_id, pieces, inline, request.segment_offset)


def _split_inline(message: bytes) -> tuple[Bytes | None, bytes]:
    """The last inline field's value as a view, and the message without such fields."""
    inline: Bytes | None = None
    rest = []
    position = copied = 0
    while position < len(message):
        start = position
        key, position = _read_varint(message, position)
        kind = key & 7
        if kind == _VARINT:
            _, position = _read_varint(message, position)
        elif kind == _FIXED64:
            position += 8
        elif kind == _FIXED32:
            position += 4
        elif kind == _DELIMITED:
            length, position = _read_varint(message, position)
            position += length
        else:
            raise InvalidArgumentError(f"not a PushRequest: wire type {kind}")
        if position > len(message):
            raise InvalidArgumentError("not a PushRequest: truncated")
        if key == _INLINE_KEY:
            inline = np.frombuffer(message, np.uint8, length, position - length)
            rest.append(message[copied:start])
            copied = position
    return inline, b"".join((*rest, message[copied:]))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    value = 0
    for index, byte in enumerate(message[position : position + 10]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise InvalidArgumentError("not a PushRequest: a number has no end")
