"""What a receiver does with single pieces, good and bad, over both transports: a Push stream written by hand."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from dataclasses import replace

import grpc
import numpy as np
import pytest
import torch

from fuseline.collectives.kv_transfer import Piece, Refusal, checksum, host_id, provenance_digest
from fuseline.collectives.kv_transfer.parcels import InlineBuffers, ParcelBuffers, SharedBuffers, attach_request
from fuseline.collectives.kv_transfer.servicer import PUSH
from fuseline.collectives.kv_transfer.wire import encode_parcel
from fuseline.collectives.segment import Bytes, OwnedSegment
from fuseline.proto.fuseline.v1 import kv_transfer_pb2 as pb
from fuseline.proto.fuseline.v1 import kv_transfer_pb2_grpc
from fuseline.runtime.errors import NotFoundError, ProvenanceError
from fuseline.runtime.sharding import ParallelConfig
from fuseline.tests.kv_ranks import UNTOUCHED, DecodeRank, Handoff, Servers, prompt_kv, provenance, reserve

NUM_TOKENS, NUM_CACHED = 20, 8
BLOCKS = [3, 1, 2]
PARALLEL = ParallelConfig(tensor_parallel_size=1, pipeline_parallel_size=2)  # the rank holds layers 0 to 2 of 5
PARCEL_BYTES = 1 << 16


class Stream:
    """A Push stream: one parcel at a time, each answered before the next."""

    def __init__(self, address: str, transport: str) -> None:
        self._segment = OwnedSegment(PARCEL_BYTES) if transport == "shm" else None
        self._buffers: ParcelBuffers = InlineBuffers(PARCEL_BYTES, 1)
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._channel = grpc.insecure_channel(address)
        push = self._channel.stream_stream(PUSH, None, pb.PushResponse.FromString)
        self._responses = push(iter(self._messages.get, None))
        if self._segment is not None:
            self._buffers = SharedBuffers(self._segment.data, PARCEL_BYTES, 1)
            assert self.ask(attach_request(self._segment)).attached

    def ask(self, message: bytes) -> pb.PushResponse:
        self._messages.put(message)
        response: pb.PushResponse = next(iter(self._responses))
        return response

    def send(self, *pieces: tuple[Piece, bytes]) -> list[Refusal | None]:
        """What became of each piece of a parcel."""
        taken = self._buffers.take()
        assert taken is not None
        slot, buffer = taken
        data = b"".join(data for _, data in pieces)
        buffer[: len(data)] = np.frombuffer(data, np.uint8)
        response = self.ask(self._buffers.encode(5, [piece for piece, _ in pieces], slot, len(data)))
        self._buffers.give_back(slot)
        assert response.parcel_id == 5
        refused = {refusal.index: Refusal(refusal.reason) for refusal in response.refused}
        return [refused.get(index) for index in range(len(pieces))]

    def close(self) -> None:
        self._messages.put(None)
        self._channel.close()
        if self._segment is not None:
            self._segment.close()


class Case:
    """An open reservation of one rank, and the pieces that it needs."""

    def __init__(self, servers: Servers, transport: str) -> None:
        self.kv = prompt_kv(NUM_TOKENS, torch.bfloat16)
        self.decode = DecodeRank(servers, transport, PARALLEL, dtype=torch.bfloat16)
        self.expected = provenance(NUM_TOKENS, torch.bfloat16)
        self.handoff: Handoff = reserve([self.decode], self.expected, BLOCKS, NUM_CACHED)
        self.stream = Stream(self.decode.address, transport)

    def piece(self, layer: int, start: int, end: int, heads: tuple[int, int] = (0, 2)) -> tuple[Piece, bytes]:
        part = self.kv[layer, :, start:end, heads[0] : heads[1]].transpose(1, 2).contiguous()
        data = part.view(torch.uint8).numpy().tobytes()
        digest = provenance_digest(self.expected)
        numbers = (layer, *heads, start, end, len(data), checksum(np.frombuffer(data, np.uint8)))
        return Piece(self.handoff.id, self.expected.epoch, digest, *numbers), data

    def all_pieces(self) -> list[tuple[Piece, bytes]]:
        return [
            self.piece(layer, start, min(start + 5, NUM_TOKENS)) for layer in range(3) for start in range(8, 20, 5)
        ]

    def verify(self) -> None:
        self.decode.receiver.verify(self.handoff.id, self.expected)
        arrived = self.decode.read(NUM_TOKENS, BLOCKS)
        assert torch.equal(arrived[:, :, NUM_CACHED:], self.decode.part_of(self.kv)[:, :, NUM_CACHED:])

    @property
    def is_untouched(self) -> bool:
        return bool((self.decode.cache == UNTOUCHED).all())


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    servers = Servers()
    yield servers
    servers.close()


@pytest.fixture(params=["shm", "grpc"])
def case(servers: Servers, request: pytest.FixtureRequest) -> Iterator[Case]:
    case = Case(servers, request.param)
    yield case
    case.stream.close()


def test_out_of_order_and_duplicates_are_fine(case: Case) -> None:
    pieces = case.all_pieces()
    assert case.stream.send(*pieces[::-2]) == [None] * len(pieces[::-2])
    assert case.stream.send(*pieces) == [None] * len(pieces)
    case.verify()
    stats = case.decode.receiver.stats()
    assert (stats.num_accepted, stats.num_duplicates) == (len(pieces), len(pieces[::-2]))
    assert stats.num_bytes == sum(len(data) for _, data in pieces)


def test_overlapping_pieces_of_single_heads_are_fine(case: Case) -> None:
    for layer in range(3):
        for heads in ((0, 1), (1, 2)):
            answers = case.stream.send(
                case.piece(layer, 10, 20, heads), case.piece(layer, 8, 9, heads), case.piece(layer, 8, 15, heads)
            )
            assert answers == [None] * 3
    case.verify()


def test_a_duplicate_is_not_written_again(case: Case) -> None:
    """What has arrived may be in use already: a duplicate must not touch it, whatever it holds."""
    case.stream.send(*case.all_pieces())
    case.verify()
    case.decode.cache.fill_(5.0)
    assert case.stream.send(*case.all_pieces()) == [None] * len(case.all_pieces())
    assert bool((case.decode.cache == 5.0).all())


BAD: dict[str, tuple[Refusal, str, Callable[[Case], tuple[Piece, bytes]]]] = {}


def bad(reason: Refusal, counter: str) -> Callable[[Callable[[Piece, bytes], tuple[Piece, bytes]]], None]:
    def register(spoil: Callable[[Piece, bytes], tuple[Piece, bytes]]) -> None:
        BAD[spoil.__name__] = reason, counter, lambda case: spoil(*case.piece(1, 8, 14))

    return register


@bad(Refusal.TRUNCATED, "num_truncated")
def short_and_says_so(piece: Piece, data: bytes) -> tuple[Piece, bytes]:
    return replace(piece, num_bytes=len(data) - 2), data[:-2]


@bad(Refusal.TRUNCATED, "num_truncated")
def longer_than_its_ranges(piece: Piece, data: bytes) -> tuple[Piece, bytes]:
    return replace(piece, num_bytes=len(data) + 2), data + b"xx"


@bad(Refusal.TRUNCATED, "num_truncated")
def of_more_tokens_than_bytes(piece: Piece, data: bytes) -> tuple[Piece, bytes]:
    return replace(piece, token_end=15), data


@bad(Refusal.CORRUPT, "num_corrupt")
def with_a_flipped_bit(piece: Piece, data: bytes) -> tuple[Piece, bytes]:
    return piece, bytes([data[0] ^ 1]) + data[1:]


@bad(Refusal.CORRUPT, "num_corrupt")
def with_another_checksum(piece: Piece, data: bytes) -> tuple[Piece, bytes]:
    return replace(piece, checksum=piece.checksum ^ 1), data


@bad(Refusal.LATE, "num_late")
def of_no_reservation(piece: Piece, data: bytes) -> tuple[Piece, bytes]:
    return replace(piece, reservation_id="0" * 32), data


@bad(Refusal.STALE, "num_stale")
def of_an_older_epoch(piece: Piece, data: bytes) -> tuple[Piece, bytes]:
    return replace(piece, epoch=0), data


@bad(Refusal.MISMATCH, "num_mismatched")
def of_another_provenance(piece: Piece, data: bytes) -> tuple[Piece, bytes]:
    return replace(piece, provenance=piece.provenance ^ 1), data


@bad(Refusal.OUT_OF_RANGE, "num_out_of_range")
def of_another_stage(piece: Piece, data: bytes) -> tuple[Piece, bytes]:
    return replace(piece, layer=3), data


@bad(Refusal.OUT_OF_RANGE, "num_out_of_range")
def of_heads_beyond_the_model(piece: Piece, data: bytes) -> tuple[Piece, bytes]:
    return replace(piece, head_start=1, head_end=3), data


@bad(Refusal.OUT_OF_RANGE, "num_out_of_range")
def of_no_heads(piece: Piece, data: bytes) -> tuple[Piece, bytes]:
    return replace(piece, head_end=0), data


@bad(Refusal.OUT_OF_RANGE, "num_out_of_range")
def of_tokens_that_decode_shares_with_others(piece: Piece, data: bytes) -> tuple[Piece, bytes]:
    return replace(piece, token_start=7, token_end=13), data


@bad(Refusal.OUT_OF_RANGE, "num_out_of_range")
def of_tokens_beyond_the_prompt(piece: Piece, data: bytes) -> tuple[Piece, bytes]:
    return replace(piece, token_start=15, token_end=21), data


@bad(Refusal.OUT_OF_RANGE, "num_out_of_range")
def of_no_tokens(piece: Piece, data: bytes) -> tuple[Piece, bytes]:
    return replace(piece, token_end=8), data


@pytest.mark.parametrize("name", BAD)
def test_bad_pieces_are_refused_counted_and_not_written(case: Case, name: str) -> None:
    reason, counter, make = BAD[name]
    assert case.stream.send(make(case)) == [reason]
    assert case.is_untouched
    stats = case.decode.receiver.stats()
    assert (getattr(stats, counter), stats.num_accepted) == (1, 0)
    with pytest.raises(ProvenanceError, match="incomplete"):
        case.decode.receiver.verify(case.handoff.id, case.expected)
    assert case.stream.send(*case.all_pieces()) == [None] * len(case.all_pieces()), "the stream goes on"
    case.verify()


def test_truncated_parcels_are_refused(case: Case) -> None:
    piece, data = case.piece(1, 8, 14)
    cut: Bytes | int = np.frombuffer(data[:-1], np.uint8)
    if case.decode.endpoint.host_id == host_id():
        cut = PARCEL_BYTES - len(data) + 1  # reaches one byte beyond the segment
    for offset in (cut, PARCEL_BYTES + 1, 2**63) if isinstance(cut, int) else (cut,):
        response = case.stream.ask(encode_parcel(1, [piece], offset))
        assert [Refusal(refused.reason) for refused in response.refused] == [Refusal.TRUNCATED]
    assert case.is_untouched


def test_late_pieces_are_refused(case: Case) -> None:
    pieces = case.all_pieces()
    case.stream.send(*pieces[:2])
    case.decode.receiver.close(case.handoff.id)
    case.decode.cache.fill_(UNTOUCHED)
    assert case.stream.send(*pieces[1:]) == [Refusal.LATE] * len(pieces[1:])
    assert case.is_untouched
    with pytest.raises(NotFoundError):
        case.decode.receiver.verify(case.handoff.id, case.expected)


@pytest.mark.parametrize("left_out", range(9))
def test_every_piece_counts(case: Case, left_out: int) -> None:
    pieces = case.all_pieces()
    case.stream.send(*pieces[:left_out], *pieces[left_out + 1 :])
    missing = pieces[left_out][0]
    found = f"layer {missing.layer}, head 0, tokens {missing.token_start}..{missing.token_end}"
    with pytest.raises(ProvenanceError, match=found):
        case.decode.receiver.verify(case.handoff.id, case.expected)
    case.stream.send(pieces[left_out])
    case.verify()


def test_one_missing_head_of_one_token_counts(case: Case) -> None:
    for piece in case.all_pieces():
        if (piece[0].layer, piece[0].token_end) != (2, NUM_TOKENS):
            case.stream.send(piece)
    case.stream.send(case.piece(2, 18, 20, (0, 1)), case.piece(2, 19, 20, (1, 2)))
    with pytest.raises(ProvenanceError, match=r"1 of 6 .* layer 2, head 1, tokens 18..19"):
        case.decode.receiver.verify(case.handoff.id, case.expected)
    assert case.decode.receiver.stats().num_failed_verifications == 1


@pytest.mark.parametrize("field", ["request_id", "epoch", "model_fingerprint", "prefix_hash", "num_tokens", "dtype"])
def test_verify_demands_the_same_provenance(case: Case, field: str) -> None:
    case.stream.send(*case.all_pieces())
    value = getattr(case.expected, field)
    other = value + 1 if isinstance(value, int) else value + value
    with pytest.raises(ProvenanceError, match=field):
        case.decode.receiver.verify(case.handoff.id, replace(case.expected, **{field: other}))  # type: ignore[arg-type]
    case.verify()


def test_rubbish_ends_the_stream_and_nothing_else(case: Case) -> None:
    with pytest.raises(grpc.RpcError) as ended:
        case.stream.ask(b"\x22\xff")
    assert ended.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert case.is_untouched
    other = Stream(case.decode.address, "grpc")
    other.send(*case.all_pieces())
    other.close()
    case.verify()


def test_generated_stubs_speak_to_it(case: Case) -> None:
    piece, data = case.piece(0, 8, 20)
    message = pb.KvPiece(**{name: getattr(piece, name) for name in Piece.__slots__})
    with grpc.insecure_channel(case.decode.address) as channel:
        stub = kv_transfer_pb2_grpc.KvTransferStub(channel)
        (answer,) = stub.Push(iter([pb.PushRequest(parcel_id=3, pieces=[message], inline=data)]))
        assert answer == pb.PushResponse(parcel_id=3)
        assert stub.Commit(pb.CommitRequest(reservation_id="x")) == pb.CommitResponse()
        assert stub.Abort(pb.AbortRequest(reservation_id="x")) == pb.AbortResponse()
    assert case.decode.receiver.stats().num_accepted == 1
