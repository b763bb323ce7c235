"""One suite over every communicator: solo, shared memory and gloo between threads and processes, NCCL between GPUs.

A scenario is what one rank does; it checks its own results against a reference computed locally and returns bytes
that must be the same on every rank. Run as a script, this file is one rank of the process-to-process case.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch

from fuseline.collectives.communicator import (
    Communicator,
    CommunicatorStore,
    GroupCommunicators,
    SoloCommunicator,
    make_communicators,
)
from fuseline.collectives.process_group import GATHER_LIMIT_BYTES, ProcessGroupCommunicator
from fuseline.collectives.shared_memory import SharedMemoryCommunicator
from fuseline.runtime.errors import InvalidArgumentError, UnavailableError
from fuseline.runtime.sharding import ParallelConfig
from fuseline.tests.timing import PROMPTLY_S

torch.set_num_threads(1)
CPU = torch.device("cpu")
TIMEOUT_S = 30.0
TRANSPORTS = {"shm": SharedMemoryCommunicator, "gloo": ProcessGroupCommunicator}
T = TypeVar("T")


def values(rank: int, shape: tuple[int, ...], dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
    """The same on every rank that asks for rank's tensor; spread widely, so that the order of additions shows."""
    generator = torch.Generator().manual_seed(1000 + rank)
    if not dtype.is_floating_point:
        return torch.randint(0, 100, shape, generator=generator).to(like.device, dtype)
    exponent = torch.randint(-6, 6, shape, generator=generator)
    return (torch.randn(shape, generator=generator) * 2.0**exponent).to(like.device, dtype)


def rank_order_sum(parts: list[torch.Tensor]) -> torch.Tensor:
    wide = torch.float32 if parts[0].is_floating_point() else parts[0].dtype
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)
    return total.to(parts[0].dtype)


def sums(comm: Communicator, device: torch.device) -> bytes:
    like, out = torch.empty(0, device=device), b""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64):
        for shape in ((1,), (7, 3), (5, 1000)):
            tensor = values(comm.rank, shape, dtype, like)
            assert comm.all_reduce(tensor) is tensor
            assert torch.equal(
                tensor, rank_order_sum([values(r, shape, dtype, like) for r in range(comm.world_size)])
            )
            out += tensor.view(torch.uint8).cpu().numpy().tobytes()
    return out


def large_sums(comm: Communicator, device: torch.device) -> bytes:
    like, out = torch.empty(0, device=device), b""
    for dtype in (torch.float32, torch.bfloat16):
        shape = (GATHER_LIMIT_BYTES // 2 + 1,)  # just beyond the limit, divisible by no world size
        tensor = comm.all_reduce(values(comm.rank, shape, dtype, like))
        assert torch.equal(tensor, rank_order_sum([values(r, shape, dtype, like) for r in range(comm.world_size)]))
        out += tensor.view(torch.uint8).cpu().numpy().tobytes()
    return out


def rows_do_not_depend_on_the_batch(comm: Communicator, device: torch.device) -> bytes:
    batch = values(comm.rank, (600, 129), torch.float32, torch.empty(0, device=device))
    row = batch[599].clone()
    comm.all_reduce(batch)
    assert batch.nbytes > GATHER_LIMIT_BYTES > row.nbytes
    assert torch.equal(comm.all_reduce(row), batch[599])
    return row.cpu().numpy().tobytes()


def gathers(comm: Communicator, device: torch.device) -> bytes:
    like, out = torch.empty(0, device=device), b""
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        for dim in (0, 1, -1):
            gathered = comm.all_gather(values(comm.rank, (3, 2, 4), dtype, like), dim)
            parts = [values(r, (3, 2, 4), dtype, like) for r in range(comm.world_size)]
            assert torch.equal(gathered, torch.cat(parts, dim)), (dtype, dim)
            out += gathered.contiguous().view(torch.uint8).cpu().numpy().tobytes()
    return out


def broadcasts(comm: Communicator, device: torch.device) -> bytes:
    like, out = torch.empty(0, device=device), b""
    for src in range(comm.world_size):
        tensor = values(comm.rank, (33,), torch.bfloat16, like)
        assert comm.broadcast(tensor, src) is tensor
        assert torch.equal(tensor, values(src, (33,), torch.bfloat16, like))
        out += tensor.view(torch.uint8).cpu().numpy().tobytes()
    return out


def many_small_in_order(comm: Communicator, device: torch.device) -> bytes:
    seen = []
    for step in range(100):
        total = comm.all_reduce(torch.tensor([step * (comm.rank + 1)], device=device))
        seen.append(int(total[0]))
    triangle = comm.world_size * (comm.world_size + 1) // 2
    assert seen == [step * triangle for step in range(100)]
    return b""


def sends_down_the_line(comm: Communicator, device: torch.device) -> bytes:
    """Each rank adds one and passes on: messages of several sizes and dtypes keep their order and their bits."""
    last = comm.world_size - 1
    for number, (size, dtype) in enumerate(
        ((1, torch.float32), (3, torch.bfloat16), (1 << 20, torch.float32), (5, torch.int64))
    ):
        tensor = torch.full((size,), number, dtype=dtype, device=device)
        if comm.rank > 0:
            assert comm.recv(tensor, comm.rank - 1) is tensor
            assert torch.equal(tensor, torch.full_like(tensor, number + comm.rank))
        if comm.rank < last:
            comm.send(tensor + 1, comm.rank + 1)
    return b""


def barriers(comm: Communicator, device: torch.device) -> bytes:
    for _ in range(3):
        entered = time.monotonic()
        comm.barrier()
        left = time.monotonic()
        times = comm.all_gather(torch.tensor([[entered, left]], dtype=torch.float64, device=device), 0)
        assert times[:, 0].max() <= times[:, 1].min()
    return b""


def refusals(comm: Communicator, device: torch.device) -> bytes:
    tensor = torch.zeros(4, 6, device=device)
    calls: tuple[Callable[[], object], ...] = (
        lambda: comm.all_reduce(tensor.t()),
        lambda: comm.all_gather(tensor.t(), 0),
        lambda: comm.all_gather(tensor, 2),
        lambda: comm.broadcast(tensor, comm.world_size),
        lambda: comm.send(tensor, comm.rank),
        lambda: comm.recv(tensor, -1),
    )
    for call in calls:
        with pytest.raises(InvalidArgumentError):
            call()
    comm.barrier()  # a refused call leaves the group usable
    return b""


SCENARIOS = (
    sums,
    large_sums,
    rows_do_not_depend_on_the_batch,
    gathers,
    broadcasts,
    many_small_in_order,
    sends_down_the_line,
    barriers,
    refusals,
)


def on_ranks(size: int, work: Callable[[int], T]) -> list[T]:
    with ThreadPoolExecutor(size) as pool:
        return [future.result(timeout=60) for future in [pool.submit(work, rank) for rank in range(size)]]


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def join(
    store_address: str, parallel: ParallelConfig, rank: int, transport: str, timeout_s: float = TIMEOUT_S
) -> GroupCommunicators:
    group = make_communicators(store_address, parallel, rank, CPU, timeout_s, shared_memory=transport == "shm")
    for axis in (group.tp, group.pp):
        assert isinstance(axis, (SoloCommunicator, TRANSPORTS[transport]))
    return group


def run_on_threads(scenario: Callable[[Communicator, torch.device], bytes], size: int, transport: str) -> list[bytes]:
    store = CommunicatorStore()

    def work(rank: int) -> bytes:
        device = torch.device("cuda", rank) if transport == "nccl" else CPU
        if transport == "nccl":
            group = make_communicators(store.address, ParallelConfig(size), rank, device, TIMEOUT_S)
        else:
            group = join(store.address, ParallelConfig(size), rank, transport)
        try:
            return scenario(group.tp, device)
        finally:
            group.close()

    try:
        return on_ranks(size, work)
    finally:
        store.close()


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_threads(scenario: Callable[[Communicator, torch.device], bytes], size: int, transport: str) -> None:
    assert len(set(run_on_threads(scenario, size, transport))) == 1


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("scenario", [sums, large_sums], ids=lambda scenario: scenario.__name__)
def test_the_transport_changes_no_bit(scenario: Callable[[Communicator, torch.device], bytes], size: int) -> None:
    assert run_on_threads(scenario, size, "shm") == run_on_threads(scenario, size, "gloo")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_nccl(scenario: Callable[[Communicator, torch.device], bytes]) -> None:
    assert len(set(run_on_threads(scenario, torch.cuda.device_count(), "nccl"))) == 1


def test_one_rank_needs_no_store() -> None:
    group = make_communicators("", ParallelConfig(), 0, CPU, TIMEOUT_S)
    assert isinstance(group.tp, SoloCommunicator)
    assert isinstance(group.pp, SoloCommunicator)


def start_process(
    store: CommunicatorStore, rank: int, size: int, mode: str, transport: str, **environment: str
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__, store.address, str(rank), str(size), mode, transport],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def start_processes(store: CommunicatorStore, size: int, mode: str, transport: str) -> list[subprocess.Popen[str]]:
    return [start_process(store, rank, size, mode, transport) for rank in range(size)]


def test_processes(transport: str) -> None:
    store = CommunicatorStore()
    processes = start_processes(store, 2, "scenarios", transport)
    outputs = [process.communicate(timeout=90)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1]
    assert outputs[0].count("\n") == len(SCENARIOS)


def test_killed_process_fails_its_peers_at_once(transport: str) -> None:
    store = CommunicatorStore()
    survivor, victim = start_processes(store, 2, "wait", transport)
    try:
        for process in (survivor, victim):
            assert process.stdout is not None
            assert process.stdout.readline() == "joined\n"
        killed_at = time.monotonic()
        victim.kill()
        assert survivor.stdout is not None
        assert survivor.stdout.readline() == "UNAVAILABLE\n"
        assert time.monotonic() - killed_at < PROMPTLY_S  # the timeout is 30 s
    finally:
        for process in (survivor, victim):
            process.kill()
            process.communicate()


def test_process_killed_among_calls_fails_all_its_peers(transport: str) -> None:
    """At whatever point of an exchange it dies: all of them are in one all the time."""
    store = CommunicatorStore()
    *survivors, victim = processes = start_processes(store, 3, "busy", transport)
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "joined\n"
        victim.kill()
        for survivor in survivors:
            assert survivor.communicate(timeout=20)[0] == "UNAVAILABLE\n"
            assert survivor.returncode == 0
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_rank_without_a_compiler_turns_all_to_gloo() -> None:
    store = CommunicatorStore()
    processes = [
        start_process(store, 0, 2, "whatever works", ""),
        start_process(store, 1, 2, "whatever works", "", PATH="", CXX=""),
    ]
    assert [process.communicate(timeout=90)[0] for process in processes] == ["ProcessGroupCommunicator\n"] * 2


def test_closing_rank_fails_its_peers_at_once(transport: str) -> None:
    store = CommunicatorStore()

    def work(rank: int) -> float:
        group = join(store.address, ParallelConfig(3), rank, transport)
        if rank == 2:
            group.close()
            return 0.0
        started = time.monotonic()
        with pytest.raises(UnavailableError, match="all_reduce"):
            group.tp.all_reduce(torch.ones(10))
        with pytest.raises(UnavailableError, match="closed"):
            group.tp.barrier()
        return time.monotonic() - started

    assert max(on_ranks(3, work)) < PROMPTLY_S


def test_hung_peer_is_given_up_after_the_timeout(transport: str) -> None:
    store = CommunicatorStore()
    hung, patient = on_ranks(
        2, lambda rank: join(store.address, ParallelConfig(1, 2), rank, transport, timeout_s=0.5 if rank else 30)
    )
    started = time.monotonic()
    with pytest.raises(UnavailableError, match="recv"):
        patient.pp.recv(torch.ones(10), 0)
    assert 0.4 < time.monotonic() - started < 10
    hung.close()


def test_joining_is_bounded(transport: str) -> None:
    store = CommunicatorStore()
    with pytest.raises(UnavailableError, match="could not join"):
        join(store.address, ParallelConfig(2), 0, transport, timeout_s=0.5)
    port = store.address.rpartition(":")[2]
    store.close()
    with pytest.raises(UnavailableError, match="no communicator store"):
        join(f"127.0.0.1:{port}", ParallelConfig(2), 0, transport, timeout_s=0.5)
    with pytest.raises(InvalidArgumentError):
        join("nonsense", ParallelConfig(2), 0, transport, timeout_s=0.5)


def test_stages_and_shards_of_two_models_in_one_process(transport: str) -> None:
    parallel = ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2)
    stores = [CommunicatorStore(), CommunicatorStore()]

    def work(index: int) -> tuple[list[int], list[int]]:
        model, rank = divmod(index, 4)
        group = join(stores[model].address, parallel, rank, transport)
        mine = torch.tensor([10 * model + rank])
        gathered = group.tp.all_gather(mine, 0).tolist(), group.pp.all_gather(mine, 0).tolist()
        assert (group.pp.rank, group.tp.rank) == divmod(rank, 2)
        group.close()
        return gathered

    results = on_ranks(8, work)
    for index, (tp, pp) in enumerate(results):
        base, rank = 10 * (index // 4), index % 4
        assert tp == [base + rank // 2 * 2, base + rank // 2 * 2 + 1]
        assert pp == [base + rank % 2, base + rank % 2 + 2]


def run_rank(store_address: str, rank: int, size: int, mode: str, transport: str) -> None:
    parallel = ParallelConfig(size)
    if mode == "whatever works":
        print(type(make_communicators(store_address, parallel, rank, CPU, TIMEOUT_S).tp).__name__)
        return
    group = join(store_address, parallel, rank, transport)
    if mode == "scenarios":
        for scenario in SCENARIOS:
            print(scenario.__name__, hashlib.sha256(scenario(group.tp, CPU)).hexdigest(), flush=True)
    elif mode == "busy":
        group.tp.all_reduce(torch.ones(10))
        print("joined", flush=True)
        try:
            while True:
                group.tp.all_reduce(torch.ones(100_000))
        except UnavailableError as error:
            print(error.code, flush=True)
    else:
        print("joined", flush=True)
        if rank == 1:
            sys.stdin.read()  # until it is killed
        try:
            group.tp.recv(torch.ones(10), 1)
        except UnavailableError as error:
            print(error.code, flush=True)
    group.close()


if __name__ == "__main__":
    run_rank(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
