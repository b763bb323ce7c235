"""Who may touch a block when: the races that close and cancel must win, each stopped at its worst moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError

import numpy as np
import pytest
import torch

from fuseline.collectives.kv_transfer import (
    KvReceiver,
    Piece,
    PieceRefusedError,
    Refusal,
    checksum,
    provenance_digest,
)
from fuseline.collectives.kv_transfer import receiver as receiver_module
from fuseline.runtime.errors import CancelledError, InternalError, UnavailableError
from fuseline.runtime.sharding import KvRange, ParallelConfig
from fuseline.tests.kv_ranks import UNTOUCHED, DecodeRank, PrefillRank, Servers, prompt_kv, provenance, reserve

EXPECTED = provenance(8)


class Gate:
    """Stops the first call of a function in its middle, until opened."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        self.num_calls = 0

    def before(self, function: Callable[..., object]) -> Callable[..., object]:
        def gated(*args: object) -> object:
            self.num_calls += 1
            self.entered.set()
            assert self.opened.wait(30)
            return function(*args)

        return gated


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as threads:
        yield threads


@pytest.fixture
def receiver() -> KvReceiver:
    receiver = KvReceiver(torch.full((1, 2, 4, 1, 8, 4), UNTOUCHED), KvRange(0, 1, 0, 1))
    receiver.open("secret", EXPECTED, [2], 0)
    return receiver


def piece() -> tuple[Piece, np.ndarray]:
    data = np.zeros(2 * 8 * 4 * 4, np.uint8)
    return Piece("secret", 1, provenance_digest(EXPECTED), 0, 0, 1, 0, 8, len(data), checksum(data)), data


def cache_of(receiver: KvReceiver) -> np.ndarray:
    return receiver._cache._bytes.view(np.float32)  # type: ignore[attr-defined, no-any-return]


def test_piece_that_is_being_checked_when_its_reservation_closes_is_not_written(
    receiver: KvReceiver, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    monkeypatch.setattr(receiver_module, "checksum", gate.before(checksum))
    accepting = threads.submit(receiver.accept, *piece())
    assert gate.entered.wait(30)
    receiver.close("secret")
    gate.opened.set()
    with pytest.raises(PieceRefusedError) as refused:
        accepting.result(30)
    assert refused.value.reason is Refusal.LATE
    assert (cache_of(receiver) == UNTOUCHED).all()


def test_close_waits_for_the_copy_under_way(
    receiver: KvReceiver, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    monkeypatch.setattr(receiver._cache, "scatter", gate.before(receiver._cache.scatter))
    accepting = threads.submit(receiver.accept, *piece())
    assert gate.entered.wait(30)
    closing = threads.submit(receiver.close, "secret")
    with pytest.raises(FutureTimeoutError):
        closing.result(0.1)
    gate.opened.set()
    closing.result(30)
    assert (cache_of(receiver)[:, :, 2] == 0).all(), "the copy was over when close returned"
    accepting.result(30)


@pytest.fixture
def servers() -> Iterator[Servers]:
    servers = Servers()
    yield servers
    servers.close()


def test_cancel_waits_for_the_copy_under_way_and_no_other_follows(
    servers: Servers, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, prefill = DecodeRank(servers, "grpc"), PrefillRank(prompt_kv(8), [3, 1])
    handoff = reserve([decode], EXPECTED, [2])
    gate = Gate()
    monkeypatch.setattr(prefill.sender._cache, "gather", gate.before(prefill.sender._cache.gather))
    prefill.sender.start(handoff.reservation, [3, 1])
    future = prefill.sender.finish(handoff.id)  # five layers
    assert gate.entered.wait(30)
    cancelling = threads.submit(prefill.sender.cancel, handoff.id)
    with pytest.raises(FutureTimeoutError):
        cancelling.result(0.1)
    assert not future.done(), "the future tells that blocks are free, so it waits as well"
    gate.opened.set()
    cancelling.result(30)
    with pytest.raises(CancelledError):
        future.result(30)
    other = reserve([decode], provenance(8, request_id="other"), [1])
    prefill.sender.start(other.reservation, [3, 1])
    prefill.sender.finish(other.id).result(30)
    assert gate.num_calls == 1 + 5, "one piece of the cancelled handoff, then a piece of each layer"
    assert torch.equal(decode.read(8, [1]), prompt_kv(8))
    assert bool((decode.read(8, [2]) == UNTOUCHED).all())
    prefill.sender.close()


def test_failure_is_told_only_when_no_copy_is_under_way(
    servers: Servers, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two destinations is gone; the caller would free the blocks that a copy for the other one still reads."""
    parallel = ParallelConfig(tensor_parallel_size=2)
    group = [DecodeRank(servers, "grpc", parallel, rank) for rank in range(2)]
    servers.stop(group[1].address)
    for _ in range(50):  # the failure may come before the copy begins: then there is nothing to see
        prefill, gate = PrefillRank(prompt_kv(8), [3, 1]), Gate()
        monkeypatch.setattr(prefill.sender._cache, "gather", gate.before(prefill.sender._cache.gather))
        handoff = reserve(group, EXPECTED, [2])
        prefill.sender.start(handoff.reservation, [3, 1])
        future = prefill.sender.finish(handoff.id)
        while not gate.entered.wait(0.01) and not future.done():
            pass
        if gate.num_calls:
            break
        assert isinstance(future.exception(), UnavailableError)
        prefill.sender.close()
    assert gate.num_calls
    deadline = time.monotonic() + 30
    while not prefill.sender.stats().num_failed and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    with pytest.raises(FutureTimeoutError):
        future.result(0.1)
    gate.opened.set()
    with pytest.raises(UnavailableError):
        future.result(30)
    prefill.sender.close()


def test_cache_that_cannot_be_read_fails_the_handoff(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")  # as torch reports a broken device

    decode, prefill = DecodeRank(servers, "shm"), PrefillRank(prompt_kv(8), [3, 1])
    handoff = reserve([decode], EXPECTED, [2])
    monkeypatch.setattr(prefill.sender._cache, "gather", fail)
    prefill.sender.start(handoff.reservation, [3, 1])
    with pytest.raises(InternalError, match="illegal memory access"):
        prefill.sender.finish(handoff.id).result(30)
    prefill.sender.close()
