"""The native exchange between ranks, here threads of this process on one array, against torch."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuseline.kernels.errors import KernelArgumentError
from fuseline.kernels.exchange import REDUCIBLE, Exchange, ExchangeError, exchange_library, num_bytes

T = TypeVar("T")
TIMEOUT_S = 30.0
TURN_BYTES = 128 << 10  # a collective call larger than this takes several turns


def library() -> ctypes.CDLL:
    found = exchange_library()
    assert found is not None
    return found


def new_segment(world: int) -> npt.NDArray[np.uint8]:
    size = num_bytes(library(), world)
    room = np.zeros(size + 128, np.uint8)
    start = -room.ctypes.data % 128
    return room[start : start + size]


def make(world: int, timeout_s: float = TIMEOUT_S) -> list[Exchange]:
    segment = new_segment(world)
    return [Exchange(library(), segment, rank, [os.getpid()] * world, timeout_s) for rank in range(world)]


def on_ranks(exchanges: list[Exchange], work: Callable[[Exchange], T]) -> list[T]:
    with ThreadPoolExecutor(len(exchanges)) as pool:
        return [future.result() for future in [pool.submit(work, exchange) for exchange in exchanges]]


def any_bits(size: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Every value of the dtype, those that are not finite and subnormal ones included."""
    tensor = torch.empty(size, dtype=dtype)
    tensor.view(torch.uint8).numpy()[:] = np.random.default_rng(seed).integers(0, 256, tensor.nbytes, np.uint8)
    return tensor


def sum_of(parts: list[torch.Tensor]) -> torch.Tensor:
    dtype = parts[0].dtype
    total = parts[0].to(torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype, copy=True)
    for part in parts[1:]:
        total += part
    return total.to(dtype)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit, but for which NaN it is."""
    not_numbers = one.isnan()
    if not torch.equal(not_numbers, other.isnan()):
        return False
    return torch.equal(one[~not_numbers].view(torch.uint8), other[~not_numbers].view(torch.uint8))


@settings(deadline=None, max_examples=60)
@given(
    world=st.integers(2, 4),
    dtype=st.sampled_from(sorted(REDUCIBLE, key=str)),
    size=st.one_of(st.integers(0, 300), st.integers(TURN_BYTES // 8 - 3, TURN_BYTES + 3)),
    seed=st.integers(0, 2**32 - 1),
)
def test_reductions_add_in_rank_order_to_the_bit(world: int, dtype: torch.dtype, size: int, seed: int) -> None:
    expected = sum_of([any_bits(size, dtype, seed + rank) for rank in range(world)])

    def work(exchange: Exchange) -> torch.Tensor:
        tensor = any_bits(size, dtype, seed + exchange.rank)
        exchange.all_reduce(tensor)
        return tensor

    results = on_ranks(make(world), work)
    assert all(same(result, expected) for result in results)
    assert len({result.view(torch.uint8).numpy().tobytes() for result in results}) == 1


@pytest.mark.parametrize("world", [2, 3, 4])
def test_no_call_disturbs_another(world: int) -> None:
    """Random calls, one right after the other: slots and mailboxes are never written before all have read them."""

    def work(exchange: Exchange) -> None:
        draw = random.Random(world)
        for number in range(300):
            size = draw.choice((draw.randrange(1, 200), draw.randrange(1, 3000), draw.randrange(30_000, 90_000)))
            src, operation = draw.randrange(world), draw.randrange(5)
            parts = [torch.full((size,), 1000.0 * rank + number) for rank in range(world)]
            mine = parts[exchange.rank].clone()
            dst = (src + 1) % world
            if operation == 0:
                exchange.all_reduce(mine)
                assert torch.equal(mine, sum_of(parts))
            elif operation == 1:
                out = torch.empty(world, size)
                exchange.all_gather(mine, out)
                assert torch.equal(out, torch.stack(parts))
            elif operation == 2:
                exchange.broadcast(mine, src)
                assert torch.equal(mine, parts[src])
            elif operation == 3 and exchange.rank == src:
                exchange.send(mine, dst)
            elif operation == 3 and exchange.rank == dst:
                exchange.recv(mine, src)
                assert torch.equal(mine, parts[src])
            elif operation == 4:
                exchange.barrier()

    on_ranks(make(world), work)


def test_native_code_calls_it_by_address() -> None:
    def work(exchange: Exchange) -> list[float]:
        native = exchange.native_all_reduce()
        call = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(native.function)
        data = torch.tensor([1.0, 10.0, 0.5]) * (exchange.rank + 1)
        assert call(native.handle, data.data_ptr(), data.numel()) == 0
        return data.tolist()

    assert on_ranks(make(3), work) == [[6.0, 60.0, 3.0]] * 3


def test_more_ranks_than_cores_get_on() -> None:
    """Ranks that share a core give way to each other: spinning through time slices, this would take minutes."""
    core = {min(os.sched_getaffinity(0))}

    def work(exchange: Exchange) -> int:
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, core)  # of this thread
        try:
            data = torch.ones(4096)
            for _ in range(1000):
                exchange.all_reduce(data)
                data /= 4
            return int(data.sum())
        finally:
            os.sched_setaffinity(0, before)

    assert on_ranks(make(4), work) == [4096] * 4


def test_who_is_late_finds_the_others_gone() -> None:
    punctual, late = make(2, timeout_s=0.05)
    with pytest.raises(ExchangeError, match="rank 1 did not come in time"):
        punctual.all_reduce(torch.ones(2))
    with pytest.raises(ExchangeError, match="rank 0 has left"):
        late.recv(torch.ones(2), 0)


def test_what_was_sent_before_leaving_arrives() -> None:
    sender, receiver = make(2)
    sender.send(torch.arange(100.0), 1)
    sender.close()
    data = torch.empty(100)
    receiver.recv(data, 0)
    assert torch.equal(data, torch.arange(100.0))
    with pytest.raises(ExchangeError, match="rank 0 has left"):
        receiver.recv(data, 0)


def test_closing_ends_a_call_under_way() -> None:
    waiting, _never_comes = make(2)
    entered = threading.Event()

    def wait() -> None:
        entered.set()
        with pytest.raises(ExchangeError, match="this rank has left"):
            waiting.barrier()

    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(wait)
        entered.wait()
        waiting.close()
        call.result()
    waiting.close()


def test_a_killed_process_is_noticed() -> None:
    """Its pid stays, as a zombie's, until its parent asks for it: that must not look alive."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    exchange = Exchange(library(), new_segment(2), 0, [os.getpid(), process.pid], TIMEOUT_S)
    process.kill()
    try:
        with pytest.raises(ExchangeError, match="the process of rank 1 is gone"):
            exchange.all_reduce(torch.ones(8))
    finally:
        process.communicate()


def test_wrong_arguments_are_refused_and_leave_it_usable() -> None:
    exchanges = make(2)
    first = exchanges[0]
    tensor = torch.zeros(4, 6)
    calls: tuple[Callable[[], object], ...] = (
        lambda: first.all_reduce(tensor.t()),
        lambda: first.all_reduce(tensor.bool()),
        lambda: first.all_reduce(tensor.to("meta")),
        lambda: first.all_gather(tensor, torch.zeros(4, 6)),
        lambda: first.broadcast(tensor, 2),
        lambda: first.send(tensor, 0),
        lambda: first.recv(tensor, -1),
        lambda: Exchange(library(), np.zeros(100, np.uint8), 0, [1, 1], 1.0),
        lambda: Exchange(library(), np.zeros(100, np.uint8), 0, [1], 1.0),
    )
    for call in calls:
        with pytest.raises(KernelArgumentError):
            call()
    on_ranks(exchanges, lambda exchange: exchange.barrier())


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_nothing_stays_open() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    descriptors = num_descriptors()
    exchange = Exchange(library(), new_segment(2), 0, [os.getpid(), process.pid], TIMEOUT_S)
    assert num_descriptors() == descriptors + 1
    del exchange
    gc.collect()
    assert num_descriptors() == descriptors
    process.communicate(b"\n")
