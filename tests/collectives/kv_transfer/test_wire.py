"""The hand-made part of the wire against the generated classes: same bytes, same meaning, and no crash on rubbish."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuseline.collectives.kv_transfer import KvReceiver, Piece
from fuseline.collectives.kv_transfer.servicer import PushSession
from fuseline.collectives.kv_transfer.wire import Parcel, decode_push, encode_parcel
from fuseline.proto.fuseline.v1 import kv_transfer_pb2 as pb
from fuseline.runtime.errors import InvalidArgumentError
from fuseline.runtime.handoff import Provenance
from fuseline.runtime.sharding import KvRange

U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
PIECES = st.builds(Piece, st.text(max_size=40), U32, U64, U32, U32, U32, U32, U32, U64, U64)


def as_message(piece: Piece) -> pb.KvPiece:
    return pb.KvPiece(**{name: getattr(piece, name) for name in Piece.__slots__})


@given(U64, st.lists(PIECES, max_size=3), st.binary(max_size=300))
def test_generated_classes_read_what_we_write(parcel_id: int, pieces: list[Piece], data: bytes) -> None:
    message = pb.PushRequest.FromString(encode_parcel(parcel_id, pieces, np.frombuffer(data, np.uint8)))
    assert message == pb.PushRequest(parcel_id=parcel_id, pieces=map(as_message, pieces), inline=data)


@given(U64, st.lists(PIECES, max_size=3), st.one_of(st.binary(max_size=300), U64))
def test_we_read_what_generated_classes_write(parcel_id: int, pieces: list[Piece], data: bytes | int) -> None:
    where = {"segment_offset": data} if isinstance(data, int) else {"inline": data}
    message = pb.PushRequest(parcel_id=parcel_id, pieces=map(as_message, pieces), **where)
    parcel = decode_push(message.SerializeToString())
    assert isinstance(parcel, Parcel)
    assert (parcel.parcel_id, parcel.pieces) == (parcel_id, tuple(pieces))
    if isinstance(data, int):
        assert (parcel.inline, parcel.segment_offset) == (None, data)
    else:
        assert parcel.inline is not None
        assert parcel.inline.tobytes() == data


def test_inline_bytes_are_not_copied() -> None:
    message = encode_parcel(1, [], np.arange(100, dtype=np.uint8))
    parcel = decode_push(message)
    assert isinstance(parcel, Parcel)
    assert parcel.inline is not None
    assert np.shares_memory(parcel.inline, np.frombuffer(message, np.uint8))


def test_fields_may_come_in_any_order_and_the_last_data_counts() -> None:
    one = pb.PushRequest(inline=b"first").SerializeToString()
    two = pb.PushRequest(parcel_id=7, pieces=[pb.KvPiece(layer=3)]).SerializeToString()
    parcel = decode_push(one + two + pb.PushRequest(inline=b"last").SerializeToString())
    assert isinstance(parcel, Parcel)
    assert parcel.inline is not None
    assert (parcel.inline.tobytes(), parcel.parcel_id, parcel.pieces[0].layer) == (b"last", 7, 3)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\x22",
        b"\x22\x05abc",  # fewer bytes than announced
        b"\x22" + b"\xff" * 11,  # a length without an end
        b"\x22" + b"\xff" * 9 + b"\x01",  # 2**64 - 1 bytes
        b"\x0f",  # a wire type that does not exist
        b"\x1a\x02\xff\xff\x22\x00",  # a broken piece
    ],
)
def test_rubbish_is_refused(message: bytes) -> None:
    with pytest.raises(InvalidArgumentError):
        decode_push(message)


PROVENANCE = Provenance("r", 1, "fp", b"hash", 8, "float32")


@settings(deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.builds(
            encode_parcel,
            U64,
            st.lists(PIECES, max_size=3),
            st.one_of(U64, st.builds(np.zeros, U32.map(lambda n: n % 99), st.just(np.uint8))),
        ),
        st.builds(
            lambda attach: pb.PushRequest(attach=attach).SerializeToString(),
            st.builds(pb.AttachSegment, pid=U32, fd=U32, name=st.text(max_size=50), num_bytes=U64),
        ),
    ),
    st.binary(max_size=5),
    st.integers(0, 200),
)
def test_random_requests_neither_crash_nor_write(message: bytes, noise: bytes, at: int) -> None:
    cache = torch.full((2, 2, 4, 2, 4, 4), 7.0)
    receiver = KvReceiver(cache, KvRange(0, 2, 0, 2))
    receiver.open("secret", PROVENANCE, [1, 2], 0)
    try:
        response = PushSession(receiver).take(message[:at] + noise + message[at:])
    except InvalidArgumentError:
        pass
    else:
        assert not response.attached
    assert bool((cache == 7.0).all())
    assert receiver.stats().num_accepted == 0
