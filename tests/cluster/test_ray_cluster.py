"""A real cluster on a private Ray: the demo model, prefill with two tensor ranks, decode with one."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from fuseline.cluster.client import AsyncClient
from fuseline.cluster.cluster_config import ClusterConfig, EngineLimits, PoolConfig
from fuseline.cluster.cluster_service import ClusterService
from fuseline.cluster.controller import STOP_TIMEOUT_S
from fuseline.cluster.gateway import Gateway, GatewayConfig
from fuseline.cluster.membership import ReplicaState
from fuseline.cluster.messages import ControllerStatus
from fuseline.cluster.processes import descendants, wait_ended
from fuseline.cluster.ray_backend import RayBackend
from fuseline.cluster.reconcile import Target
from fuseline.runtime.errors import ResourceExhaustedError
from fuseline.runtime.sampling_params import SamplingParams
from fuseline.runtime.sharding import ParallelConfig
from fuseline.tests.cluster.memory_cluster import until
from fuseline.tests.timing import PATIENTLY_S, PROMPTLY_S
from fuseline.workers.loader import model_info, resolve_model
from fuseline.workers.tokenizer import Tokenizer

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

CONFIG = ClusterConfig(
    device="cpu",
    prefill=PoolConfig(1, ParallelConfig(tensor_parallel_size=2)),
    decode=PoolConfig(1),
    limits=EngineLimits(max_model_len=512, num_blocks=256, max_num_seqs=16, max_num_batched_tokens=256),
)
NUM_USERS = 4


@pytest.fixture(scope="module")
def backend() -> Iterator[RayBackend]:
    """The cluster. It is shared, so every test leaves it with one replica of each kind."""
    before = descendants(os.getpid())
    with RayBackend.start(CONFIG) as backend:
        yield backend
        log_dir = backend.log_dir
    assert descendants(os.getpid()) <= before
    assert log_dir is not None
    assert not log_dir.exists()


@asynccontextmanager
async def gateway_of(backend: RayBackend) -> AsyncIterator[AsyncClient]:
    path = resolve_model(CONFIG.model)
    model = model_info(path, CONFIG.dtype, CONFIG.limits.max_model_len, CONFIG.name)
    service = ClusterService(backend.controller, stop=lambda: None)
    gateway = Gateway(GatewayConfig(), model, Tokenizer.load(path), backend.membership, service)
    service.snapshots = gateway.pool.snapshots
    port = await gateway.start()
    try:
        await asyncio.wait_for(gateway.wait_ready(), PATIENTLY_S)
        client = AsyncClient(f"127.0.0.1:{port}")
        yield client
        await client.close()
    finally:
        await gateway.stop(1.0)


async def test_the_configured_replicas_start_and_serve(backend: RayBackend) -> None:
    status = await until(backend.controller, lambda status: status.reached)
    prefill, decode = status.replicas
    assert (len(prefill.pids), len(decode.pids)) == (2, 1)
    assert {prefill.num_restarts, decode.num_restarts} == {0}
    for pid in (*prefill.pids, *decode.pids):
        # Nothing lies where Ray lets a worker start, so nothing there can hide a module of ours.
        assert os.listdir(f"/proc/{pid}/cwd") == []  # noqa: PTH208  # a link into a file system that may be gone
    async with gateway_of(backend) as client:
        result = await client.complete(
            "Once upon a time", SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        )
        assert len(result.completions[0].token_ids) == 8
        seen = await client.status()
        assert [replica.load is not None for replica in seen.replicas] == [True, True]


async def test_decode_scales_up_and_down_while_requests_run_and_none_is_lost(backend: RayBackend) -> None:
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    async with gateway_of(backend) as client:
        expected = (await client.complete("The little dog", params)).completions[0].token_ids
        answers: asyncio.Queue[str] = asyncio.Queue()
        stop = asyncio.Event()

        async def keep_asking() -> None:
            while not stop.is_set():
                completion = (await client.complete("The little dog", params)).completions[0]
                assert completion.token_ids == expected
                await answers.put(completion.summary.decode_worker)

        async with asyncio.timeout(2 * PATIENTLY_S), asyncio.TaskGroup() as users:
            for _ in range(NUM_USERS):
                users.create_task(keep_asking())
            up = await client.scale(decode=2, wait=True, timeout=PATIENTLY_S)
            decoders = {replica.worker_id for replica in up.replicas if replica.role == "decode"}
            assert len(decoders) == 2
            seen: set[str] = set()
            while not decoders <= seen:
                seen.add(await answers.get())
            down = await client.scale(decode=1, wait=True, timeout=PATIENTLY_S)
            (left,) = {replica.worker_id for replica in down.replicas} & decoders
            # Answers of the other one may still be on their way, one per user.
            for _ in range(answers.qsize() + NUM_USERS):
                await answers.get()
            assert await answers.get() == left
            stop.set()


async def test_replicas_of_killed_processes_are_replaced(
    backend: RayBackend, capfd: pytest.CaptureFixture[str]
) -> None:
    status = await until(backend.controller, lambda status: status.reached)
    prefill, decode = status.replicas
    doomed = {process for process in descendants(os.getpid()) if process.pid in (*prefill.pids, *decode.pids)}
    assert len(doomed) == 3
    os.kill(decode.pids[0], signal.SIGKILL)  # the replica's serving process: Ray notices at once
    await until(backend.controller, lambda status: not is_ready(status, decode.worker_id), PROMPTLY_S)
    os.kill(prefill.pids[1], signal.SIGKILL)  # a rank of a group that is idle
    await until(backend.controller, lambda status: not is_ready(status, prefill.worker_id), 2 * PROMPTLY_S)
    status = await until(backend.controller, lambda status: status.reached)
    assert {row.worker_id for row in status.replicas}.isdisjoint({prefill.worker_id, decode.worker_id})
    assert [row.num_restarts for row in status.replicas] == [1, 1]
    assert await asyncio.to_thread(wait_ended, doomed, STOP_TIMEOUT_S) == set()
    assert "raylet" not in "".join(capfd.readouterr()), "it is for us to tell users of it"


def is_ready(status: ControllerStatus, worker_id: str) -> bool:
    return any(row.worker_id == worker_id and row.state is ReplicaState.READY for row in status.replicas)


async def test_more_than_the_machine_has_is_refused_with_numbers(backend: RayBackend) -> None:
    num_cpus = os.cpu_count() or 1
    with pytest.raises(ResourceExhaustedError, match="the cluster is too small") as caught:
        await backend.controller.set_target(Target(1, 4 * num_cpus))
    assert caught.value.details["needed_cpus"] == f"{num_cpus + 0.5:g}"
    assert caught.value.details["total_cpus"] == f"{num_cpus}"
    assert (await backend.controller.status()).target == Target(1, 1)


async def test_a_killed_controller_comes_back_and_finds_everything(backend: RayBackend) -> None:
    await backend.controller.set_target(Target(0, 1))
    before = await until(backend.controller, lambda status: status.reached)
    views = backend.membership.watch()
    assert len((await anext(views)).replicas) == 1
    os.kill(controller_pid(), signal.SIGKILL)
    after = await until(backend.controller, lambda status: status.reached and status.uptime_s < before.uptime_s)
    assert after.target == Target(0, 1)
    assert [row.worker_id for row in after.replicas] == [row.worker_id for row in before.replicas]
    again = await asyncio.wait_for(anext(views), PATIENTLY_S)
    assert [info.worker_id for info in again.replicas] == [row.worker_id for row in before.replicas]


def controller_pid() -> int:
    for process in descendants(os.getpid()):
        if b"ControllerActor" in Path(f"/proc/{process.pid}/cmdline").read_bytes():
            return process.pid
    raise AssertionError("there is no controller")


def test_a_controller_that_ray_cannot_ask_for_is_missing(
    backend: RayBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that takes this for a crash of its own would never look again."""
    from ray.exceptions import RayError

    from fuseline.cluster.worker_actor import _controller_exists

    assert _controller_exists()

    def fail(name: str) -> None:
        raise RayError(name)

    monkeypatch.setattr("ray.get_actor", fail)
    assert not _controller_exists()


DRIVER = """
import asyncio, signal, sys
from fuseline.cluster.cluster_config import ClusterConfig, PoolConfig
from fuseline.cluster.ray_backend import RayBackend

signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background inherit that it is ignored
with RayBackend.start(ClusterConfig(device="cpu", prefill=PoolConfig(0), ray_address=sys.argv[1])) as backend:
    status = asyncio.run(backend.controller.status())
    print(status.config.ray_address or backend.log_dir, flush=True)
    signal.pause()
"""


def start_driver(address: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", DRIVER, address], stdout=subprocess.PIPE, text=True)


def first_line(driver: subprocess.Popen[str]) -> str:
    assert driver.stdout is not None
    with driver.stdout as lines:
        return lines.readline().strip()


def test_a_driver_that_is_told_to_end_leaves_no_process_behind(backend: RayBackend) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    before = descendants(os.getpid())
    own, joined = start_driver(""), start_driver(address)
    log_dir = Path(first_line(own))
    processes = descendants(own.pid)
    assert len(processes) >= 5  # Ray's own at least; its replica may be starting
    own.send_signal(signal.SIGTERM)
    assert first_line(joined) == address
    joined.send_signal(signal.SIGINT)
    assert own.wait(PATIENTLY_S) == 128 + signal.SIGTERM
    assert wait_ended(processes, 0.0) == set()
    assert not log_dir.exists()
    assert joined.wait(PATIENTLY_S) == -signal.SIGINT
    assert wait_ended(descendants(os.getpid()) - before, PATIENTLY_S) == set()
    assert before <= descendants(os.getpid())
