"""One suite over both transports of KV transfer, from a sender's cache to a receiver's. Bytes are compared exactly.

Single pieces, as a sender would never make them, are in ``test_kv_transfer_pieces``; several processes, some of which
are killed, in ``test_kv_transfer_processes``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch

from fuseline.collectives.kv_transfer import KvReceiver, Piece, servicer
from fuseline.collectives.kv_transfer import sender as sender_module
from fuseline.collectives.kv_transfer.lane import Lane
from fuseline.collectives.segment import Bytes
from fuseline.runtime.errors import (
    AlreadyExistsError,
    CancelledError,
    FuselineError,
    InvalidArgumentError,
    NotFoundError,
    ProvenanceError,
    ResourceExhaustedError,
    UnavailableError,
)
from fuseline.runtime.handoff import TransferSummary
from fuseline.runtime.sharding import KvRange, ParallelConfig
from fuseline.tests.kv_ranks import (
    NUM_BLOCKS,
    SHAPE,
    SMALL,
    UNTOUCHED,
    DecodeRank,
    Handoff,
    PrefillRank,
    Servers,
    prompt_kv,
    provenance,
    reserve,
)

NUM_TOKENS = 37
SOURCE_BLOCKS = [9, 3, 4, 5, 15, 0, 1, 11, 7, 2]  # of 4 tokens
DECODE_BLOCKS = [12, 13, 2, 8, 5]  # of 8 tokens
LAYOUTS = [ParallelConfig(tp, pp) for tp in (1, 2, 4) for pp in (1, 2, 4)]


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    servers = Servers()
    yield servers
    servers.close()


@pytest.fixture(params=["shm", "grpc"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def ranks() -> Iterator[list[PrefillRank]]:
    """Prefill ranks put here are closed after the test."""
    ranks: list[PrefillRank] = []
    yield ranks
    for rank in ranks:
        rank.sender.close()
        assert rank.sender.stats().num_open == 0


def outcome(future: Future[TransferSummary]) -> TransferSummary:
    return future.result(timeout=30)


def was_closed(lane: Lane) -> bool:
    """Whether it is, or is soon."""
    with lane._changed:
        return lane._changed.wait_for(lambda: lane.error is not None, timeout=30)


def push_all(rank: PrefillRank, handoff: Handoff, num_tokens: int = NUM_TOKENS, chunk: int = 16) -> None:
    """As a chunked prefill does: layer by layer, chunk by chunk."""
    for start in range(0, num_tokens, chunk):
        for layer in rank.layers:
            rank.sender.push(handoff.id, layer, start, min(num_tokens, start + chunk))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_arrives_and_touches_nothing_else(
    servers: Servers, transport: str, ranks: list[PrefillRank], dtype: torch.dtype
) -> None:
    kv = prompt_kv(NUM_TOKENS, dtype)
    decode = DecodeRank(servers, transport, dtype=dtype)
    ranks.append(PrefillRank(kv, SOURCE_BLOCKS))
    handoff = reserve([decode], provenance(NUM_TOKENS, dtype), DECODE_BLOCKS)
    ranks[0].sender.start(handoff.reservation, SOURCE_BLOCKS)
    push_all(ranks[0], handoff)
    summary = outcome(ranks[0].sender.finish(handoff.id))
    assert (summary.transport, summary.num_bytes) == (transport, kv.nbytes)
    decode.receiver.verify(handoff.id, handoff.reservation.provenance)
    assert torch.equal(decode.read(NUM_TOKENS, DECODE_BLOCKS), kv.to(dtype))
    num_written = int((decode.cache != UNTOUCHED).sum())
    assert num_written == kv.numel()
    decode.receiver.close(handoff.id)
    assert decode.receiver.stats().num_open == ranks[0].sender.stats().num_open == 0


@pytest.mark.parametrize("source", LAYOUTS, ids=lambda p: f"tp{p.tensor_parallel_size}pp{p.pipeline_parallel_size}")
def test_every_layout_to_every_layout(
    servers: Servers, transport: str, ranks: list[PrefillRank], source: ParallelConfig
) -> None:
    kv, expected = prompt_kv(NUM_TOKENS), provenance(NUM_TOKENS)
    ranks += [PrefillRank(kv, SOURCE_BLOCKS, source, rank) for rank in range(source.world_size)]
    for destination in LAYOUTS:
        group = [DecodeRank(servers, transport, destination, rank) for rank in range(destination.world_size)]
        handoff = reserve(group, expected, DECODE_BLOCKS)
        for rank in ranks:
            rank.sender.start(handoff.reservation, SOURCE_BLOCKS)
        futures = []
        for rank in ranks:
            push_all(rank, handoff, chunk=NUM_TOKENS)
            futures.append(rank.sender.finish(handoff.id))
        num_bytes = sum(outcome(future).num_bytes for future in futures)
        assert num_bytes == sum(rank.part_of(kv).nbytes for rank in group), "each rank's share is sent exactly once"
        for decode in group:
            decode.receiver.verify(handoff.id, expected)
            assert torch.equal(decode.read(NUM_TOKENS, DECODE_BLOCKS), decode.part_of(kv))
            decode.receiver.close(handoff.id)
            servers.stop(decode.address)


def test_prefix_that_decode_holds_is_not_sent(servers: Servers, transport: str, ranks: list[PrefillRank]) -> None:
    kv, decode = prompt_kv(NUM_TOKENS), DecodeRank(servers, transport)
    ranks.append(PrefillRank(kv, SOURCE_BLOCKS))
    handoff = reserve([decode], provenance(NUM_TOKENS), DECODE_BLOCKS, num_cached_tokens=16)
    ranks[0].sender.start(handoff.reservation, SOURCE_BLOCKS)
    push_all(ranks[0], handoff)
    assert outcome(ranks[0].sender.finish(handoff.id)).num_bytes == kv[:, :, 16:].nbytes
    decode.receiver.verify(handoff.id, handoff.reservation.provenance)
    arrived = decode.read(NUM_TOKENS, DECODE_BLOCKS)
    assert torch.equal(arrived[:, :, 16:], kv[:, :, 16:])
    assert bool((arrived[:, :, :16] == UNTOUCHED).all())


def test_finish_sends_what_was_not_pushed_and_nothing_goes_twice(
    servers: Servers, transport: str, ranks: list[PrefillRank]
) -> None:
    kv, decode = prompt_kv(NUM_TOKENS), DecodeRank(servers, transport)
    ranks.append(PrefillRank(kv, SOURCE_BLOCKS, limits=replace(SMALL, max_queued=2)))
    handoff = reserve([decode], provenance(NUM_TOKENS), DECODE_BLOCKS)
    sender = ranks[0].sender
    sender.start(handoff.reservation, SOURCE_BLOCKS)
    sender.push(handoff.id, 2, 5, 20)
    sender.push(handoff.id, 2, 0, 9)
    sender.push(handoff.id, 99, 0, 9)  # a layer of another stage
    for _ in range(50):  # more than the queue takes: left to finish
        push_all(ranks[0], handoff, chunk=3)
    future = sender.finish(handoff.id)
    assert outcome(future).num_bytes == kv.nbytes
    decode.receiver.verify(handoff.id, handoff.reservation.provenance)
    assert torch.equal(decode.read(NUM_TOKENS, DECODE_BLOCKS), kv)
    assert sender.stats().num_deferred > 0
    assert decode.receiver.stats().num_duplicates == 0


def test_many_handoffs_at_once(servers: Servers, transport: str, ranks: list[PrefillRank]) -> None:
    """Of one prompt each, to one rank and its own blocks; all interleave on one stream."""
    kv, decode = prompt_kv(8), DecodeRank(servers, transport)
    ranks.append(PrefillRank(kv, SOURCE_BLOCKS))
    expected = [provenance(8, request_id=f"request-{index}") for index in range(NUM_BLOCKS)]
    handoffs = [reserve([decode], expected[index], [index]) for index in range(NUM_BLOCKS)]
    for handoff in handoffs:
        ranks[0].sender.start(handoff.reservation, SOURCE_BLOCKS)
    for layer in ranks[0].layers:
        for handoff in handoffs:
            ranks[0].sender.push(handoff.id, layer, 0, 8)
    for index, future in enumerate([ranks[0].sender.finish(handoff.id) for handoff in handoffs]):
        outcome(future)
        decode.receiver.verify(handoffs[index].id, expected[index])
        assert torch.equal(decode.read(8, [index]), kv)
    assert ranks[0].sender.stats().num_lanes == 1


class FaultyReceiver(KvReceiver):
    """Flips a bit of the first ``num_faults`` pieces on their way in; waits for ``gate`` before every piece."""

    num_faults = 0
    num_seen = 0

    def __init__(self, cache: torch.Tensor, kv_range: KvRange) -> None:
        super().__init__(cache, kv_range)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def accept(self, piece: Piece, data: Bytes) -> None:
        self.num_seen += 1
        self.entered.set()
        assert self.gate.wait(30)
        if self.num_faults > 0:
            self.num_faults -= 1
            data = data.copy()
            data[len(data) // 2] ^= 1
        super().accept(piece, data)


def faulty_rank(servers: Servers, transport: str) -> tuple[DecodeRank, FaultyReceiver]:
    decode = DecodeRank(servers, transport, receiver_class=FaultyReceiver)
    assert isinstance(decode.receiver, FaultyReceiver)
    return decode, decode.receiver


def begin(ranks: list[PrefillRank], decode: DecodeRank, kv: torch.Tensor) -> tuple[Handoff, Future[TransferSummary]]:
    """Hand a prompt over from a new prefill rank, all of it queued."""
    ranks.append(PrefillRank(kv, SOURCE_BLOCKS))
    handoff = reserve([decode], provenance(NUM_TOKENS), DECODE_BLOCKS)
    ranks[-1].sender.start(handoff.reservation, SOURCE_BLOCKS)
    return handoff, ranks[-1].sender.finish(handoff.id)


def test_corrupted_pieces_are_sent_again(servers: Servers, transport: str, ranks: list[PrefillRank]) -> None:
    kv = prompt_kv(NUM_TOKENS)
    decode, receiver = faulty_rank(servers, transport)
    receiver.num_faults = SMALL.max_retries
    handoff, future = begin(ranks, decode, kv)
    outcome(future)
    receiver.verify(handoff.id, handoff.reservation.provenance)
    assert torch.equal(decode.read(NUM_TOKENS, DECODE_BLOCKS), kv)
    assert receiver.stats().num_corrupt == ranks[0].sender.stats().num_retries == SMALL.max_retries


def test_corruption_that_persists_fails_the_handoff(
    servers: Servers, transport: str, ranks: list[PrefillRank]
) -> None:
    decode, receiver = faulty_rank(servers, transport)
    receiver.num_faults = 10**6
    handoff, future = begin(ranks, decode, prompt_kv(NUM_TOKENS))
    with pytest.raises(ProvenanceError, match="checksum"):
        outcome(future)
    with pytest.raises(ProvenanceError, match="incomplete"):
        receiver.verify(handoff.id, handoff.reservation.provenance)
    assert bool((decode.cache == UNTOUCHED).all())
    num_pieces = -(-prompt_kv(NUM_TOKENS).nbytes // SMALL.inline_parcel_bytes) + SHAPE.num_layers
    assert receiver.num_seen <= num_pieces * (1 + SMALL.max_retries)


@pytest.mark.parametrize(
    "wrong",
    [{"epoch": 2}, {"model_fingerprint": "other"}, {"prefix_hash": b"other"}, {"request_id": "other"}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_kv_of_something_else_is_refused(
    servers: Servers, transport: str, ranks: list[PrefillRank], wrong: dict[str, object]
) -> None:
    """The prefill side believes that it computes something else than decode asked for."""
    decode = DecodeRank(servers, transport)
    ranks.append(PrefillRank(prompt_kv(NUM_TOKENS), SOURCE_BLOCKS))
    handoff = reserve([decode], provenance(NUM_TOKENS), DECODE_BLOCKS)
    believed = replace(handoff.reservation.provenance, **wrong)  # type: ignore[arg-type]
    ranks[0].sender.start(replace(handoff.reservation, provenance=believed), SOURCE_BLOCKS)
    with pytest.raises(ProvenanceError):
        outcome(ranks[0].sender.finish(handoff.id))
    assert bool((decode.cache == UNTOUCHED).all())
    stats = decode.receiver.stats()
    assert stats.num_accepted == 0
    assert (stats.num_stale > 0, stats.num_mismatched > 0) == ("epoch" in wrong, "epoch" not in wrong)
    with pytest.raises(ProvenanceError, match=next(iter(wrong))):
        decode.receiver.verify(handoff.id, believed)


def test_nothing_is_written_after_close(servers: Servers, transport: str, ranks: list[PrefillRank]) -> None:
    """The decode side gives up in the middle, and uses the blocks for another sequence at once."""
    decode, receiver = faulty_rank(servers, transport)
    receiver.gate.clear()
    handoff, future = begin(ranks, decode, prompt_kv(NUM_TOKENS))
    assert receiver.entered.wait(30)
    receiver.close(handoff.id)
    decode.cache.fill_(UNTOUCHED)
    receiver.gate.set()
    with pytest.raises(UnavailableError, match="gave up"):
        outcome(future)
    assert bool((decode.cache == UNTOUCHED).all())
    assert receiver.stats().num_late > 0
    again, future = begin(ranks, decode, prompt_kv(NUM_TOKENS, seed=1))
    outcome(future)
    receiver.verify(again.id, again.reservation.provenance)
    assert torch.equal(decode.read(NUM_TOKENS, DECODE_BLOCKS), prompt_kv(NUM_TOKENS, seed=1))


def test_nothing_is_read_after_cancel(servers: Servers, transport: str, ranks: list[PrefillRank]) -> None:
    """The prefill side gives up in the middle, and uses the blocks for another sequence at once."""
    kv = prompt_kv(NUM_TOKENS)
    decode, receiver = faulty_rank(servers, transport)
    receiver.gate.clear()
    handoff, future = begin(ranks, decode, kv)
    assert receiver.entered.wait(30)
    ranks[0].sender.cancel(handoff.id)
    ranks[0].sender.cancel(handoff.id)
    ranks[0].cache.fill_(99.0)
    receiver.gate.set()
    with pytest.raises(CancelledError):
        outcome(future)
    ranks[0].sender.push(handoff.id, 0, 0, 8)  # as a model runner may that has not heard of it yet
    with pytest.raises(NotFoundError):
        ranks[0].sender.finish(handoff.id)
    _, future = begin(ranks, decode, kv)  # flushes the streams: what was under way has arrived
    outcome(future)
    with pytest.raises(ProvenanceError, match="incomplete"):
        receiver.verify(handoff.id, handoff.reservation.provenance)
    assert not bool((decode.cache == 99.0).any())


def test_dead_receiver_fails_its_handoffs_only(servers: Servers, transport: str, ranks: list[PrefillRank]) -> None:
    kv = prompt_kv(NUM_TOKENS)
    decode, receiver = faulty_rank(servers, transport)
    receiver.gate.clear()
    handoff, future = begin(ranks, decode, kv)
    assert receiver.entered.wait(30)
    receiver.gate.set()
    servers.stop(decode.address)
    with pytest.raises(UnavailableError):
        outcome(future)
    alive = DecodeRank(servers, transport)
    other = reserve([alive], provenance(NUM_TOKENS), DECODE_BLOCKS)
    ranks[0].sender.start(other.reservation, SOURCE_BLOCKS)
    outcome(ranks[0].sender.finish(other.id))
    assert torch.equal(alive.read(NUM_TOKENS, DECODE_BLOCKS), kv)
    receiver.close(handoff.id)


def test_unreachable_receiver_is_unavailable(servers: Servers, transport: str, ranks: list[PrefillRank]) -> None:
    decode = DecodeRank(servers, transport)
    servers.stop(decode.address)
    _, future = begin(ranks, decode, prompt_kv(NUM_TOKENS))
    with pytest.raises(UnavailableError):
        outcome(future)


def test_silent_receiver_is_given_up(servers: Servers, transport: str, ranks: list[PrefillRank]) -> None:
    decode, receiver = faulty_rank(servers, transport)
    receiver.gate.clear()
    ranks.append(PrefillRank(prompt_kv(NUM_TOKENS), SOURCE_BLOCKS, limits=replace(SMALL, ack_timeout_s=0.3)))
    handoff = reserve([decode], provenance(NUM_TOKENS), DECODE_BLOCKS)
    ranks[0].sender.start(handoff.reservation, SOURCE_BLOCKS)
    with pytest.raises(UnavailableError, match="does not answer"):
        outcome(ranks[0].sender.finish(handoff.id))
    receiver.gate.set()


def test_closed_sender_leaves_the_reservation_incomplete(
    servers: Servers, transport: str, ranks: list[PrefillRank]
) -> None:
    decode, receiver = faulty_rank(servers, transport)
    receiver.gate.clear()
    handoff, future = begin(ranks, decode, prompt_kv(NUM_TOKENS))
    assert receiver.entered.wait(30)
    ranks[0].sender.close()
    with pytest.raises(CancelledError):
        outcome(future)
    receiver.gate.set()
    with pytest.raises(ProvenanceError, match="incomplete"):
        receiver.verify(handoff.id, handoff.reservation.provenance)
    with pytest.raises(UnavailableError):
        ranks[0].sender.start(handoff.reservation, SOURCE_BLOCKS)


def test_slow_receiver_bounds_what_is_in_flight_and_delays_nobody_else(
    servers: Servers, transport: str, ranks: list[PrefillRank]
) -> None:
    kv = prompt_kv(NUM_TOKENS)
    slow, receiver = faulty_rank(servers, transport)
    fast = DecodeRank(servers, transport)
    receiver.gate.clear()
    handoff, future = begin(ranks, slow, kv)
    assert receiver.entered.wait(30)
    other = reserve([fast], provenance(NUM_TOKENS), DECODE_BLOCKS)
    ranks[0].sender.start(other.reservation, SOURCE_BLOCKS)
    outcome(ranks[0].sender.finish(other.id))
    assert not future.done()
    (lane,) = [lane for lane in ranks[0].sender._lanes.values() if lane.address == slow.address]
    assert 0 < len(lane._in_flight) <= SMALL.num_inline_parcels == SMALL.num_shared_parcels
    receiver.gate.set()
    outcome(future)
    receiver.verify(handoff.id, handoff.reservation.provenance)
    assert torch.equal(slow.read(NUM_TOKENS, DECODE_BLOCKS), kv)


def test_bytes_go_inline_when_memory_cannot_be_shared(
    servers: Servers, ranks: list[PrefillRank], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Bytes:
        raise UnavailableError("no ptrace for you")

    monkeypatch.setattr(servicer, "attach_segment", refuse)
    kv, decode = prompt_kv(NUM_TOKENS), DecodeRank(servers, "shm")
    _, future = begin(ranks, decode, kv)
    assert outcome(future).transport == "grpc"
    assert torch.equal(decode.read(NUM_TOKENS, DECODE_BLOCKS), kv)


def test_idle_connections_are_closed_and_made_again(
    servers: Servers, transport: str, ranks: list[PrefillRank], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender_module, "WAKE_S", 0.05)  # how often is looked
    kv, decode = prompt_kv(NUM_TOKENS), DecodeRank(servers, transport)
    ranks.append(PrefillRank(kv, SOURCE_BLOCKS, limits=replace(SMALL, idle_s=0.05)))
    sender = ranks[0].sender
    for _ in range(2):
        handoff = reserve([decode], provenance(NUM_TOKENS), DECODE_BLOCKS)
        sender.start(handoff.reservation, SOURCE_BLOCKS)
        (lane,) = sender._lanes.values()  # which stays as long as it has a handoff
        outcome(sender.finish(handoff.id))
        decode.receiver.close(handoff.id)
        assert was_closed(lane)
        assert sender.stats().num_lanes == 0
    assert sender.stats().num_finished == 2


def test_refuses_what_does_not_fit(servers: Servers, ranks: list[PrefillRank]) -> None:
    decode, expected = DecodeRank(servers, "grpc"), provenance(NUM_TOKENS)
    ranks.append(
        PrefillRank(prompt_kv(NUM_TOKENS), SOURCE_BLOCKS, limits=replace(SMALL, max_handoffs=1, max_lanes=1))
    )
    sender, receiver = ranks[0].sender, decode.receiver
    handoff = reserve([decode], expected, DECODE_BLOCKS)
    refusals: list[tuple[type[FuselineError], object]] = [
        (AlreadyExistsError, lambda: receiver.open(handoff.id, expected, DECODE_BLOCKS, 0)),
        (InvalidArgumentError, lambda: receiver.open("a", expected, DECODE_BLOCKS[:4], 0)),
        (InvalidArgumentError, lambda: receiver.open("a", expected, [*DECODE_BLOCKS[:4], NUM_BLOCKS], 0)),
        (InvalidArgumentError, lambda: receiver.open("a", expected, [*DECODE_BLOCKS[:4], -1], 0)),
        (InvalidArgumentError, lambda: receiver.open("a", expected, DECODE_BLOCKS, 12)),
        (InvalidArgumentError, lambda: receiver.open("a", expected, DECODE_BLOCKS, 40)),
        (InvalidArgumentError, lambda: receiver.open("a", replace(expected, dtype="float16"), DECODE_BLOCKS, 0)),
        (NotFoundError, lambda: receiver.verify("a", expected)),
        (InvalidArgumentError, lambda: sender.start(handoff.reservation, SOURCE_BLOCKS[:9])),
        (InvalidArgumentError, lambda: sender.start(handoff.reservation, [*SOURCE_BLOCKS[:9], NUM_BLOCKS])),
        (NotFoundError, lambda: sender.finish("a")),
    ]
    sender.start(handoff.reservation, SOURCE_BLOCKS)
    other = replace(handoff.reservation, reservation_id="other")
    refusals += [
        (AlreadyExistsError, lambda: sender.start(handoff.reservation, SOURCE_BLOCKS)),
        (ResourceExhaustedError, lambda: sender.start(other, SOURCE_BLOCKS)),
    ]
    for error, call in refusals:
        with pytest.raises(error):
            call()  # type: ignore[operator]
    sender.cancel(handoff.id)
    elsewhere = replace(handoff.reservation.endpoints[0], address="127.0.0.1:1")
    with pytest.raises(ResourceExhaustedError, match="destinations"):
        sender.start(replace(other, endpoints=(elsewhere,)), SOURCE_BLOCKS)
    receiver.close("never opened")
