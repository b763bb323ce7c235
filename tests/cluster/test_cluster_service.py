"""The Cluster service on a real gRPC server, over a controller whose workers live in memory."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import pytest

from fuseline import __version__
from fuseline.cluster import cluster_service
from fuseline.cluster.cluster_service import ClusterService
from fuseline.cluster.controller import Controller
from fuseline.cluster.membership import ReplicaState
from fuseline.cluster.messages import ControllerStatus
from fuseline.proto.fuseline.v1 import cluster_pb2, cluster_pb2_grpc, worker_pb2
from fuseline.runtime.errors import InvalidArgumentError, NotFoundError, ResourceExhaustedError, UnavailableError
from fuseline.tests.cluster.memory_cluster import Cluster, Worker, reached, running, until
from fuseline.tests.timing import PATIENTLY_S
from fuseline.workers.grpc_errors import error_from_rpc

PREFILL, DECODE, MIXED = (worker_pb2.WORKER_ROLE_PREFILL, worker_pb2.WORKER_ROLE_DECODE, worker_pb2.WORKER_ROLE_MIXED)


@dataclass
class Served:
    cluster: Cluster
    controller: Controller
    service: ClusterService
    stopped: asyncio.Event
    stub: Any

    async def set_target(self, *sizes: tuple[worker_pb2.WorkerRole, int], wait: bool = True) -> Any:
        request = cluster_pb2.SetTargetRequest(wait=wait)
        for role, num_replicas in sizes:
            request.sizes.add(role=role, num_replicas=num_replicas)
        return await self.stub.SetTarget(request, timeout=PATIENTLY_S)


@asynccontextmanager
async def serving() -> AsyncIterator[Served]:
    cluster, stopped = Cluster(), asyncio.Event()
    async with running(cluster) as controller:
        await reached(controller)
        service = ClusterService(controller, stop=stopped.set)
        server = grpc.aio.server()
        cluster_pb2_grpc.add_ClusterServicer_to_server(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Served(cluster, controller, service, stopped, cluster_pb2_grpc.ClusterStub(channel))
        await server.stop(0)


async def test_status_tells_what_should_be_and_what_is() -> None:
    async with serving() as served:
        worker_id = (await reached(served.controller))[1]
        served.service.snapshots = lambda: {worker_id: worker_pb2.WorkerSnapshot(num_running=3)}
        status = await served.stub.GetStatus(cluster_pb2.GetStatusRequest())
    assert (status.model, status.version) == ("demo", __version__)
    assert [(pool.role, pool.num_replicas, pool.tensor_parallel_size) for pool in status.target] == [
        (PREFILL, 1, 1),
        (DECODE, 1, 1),
    ]
    prefill, decode = status.replicas
    assert (prefill.role, prefill.state, prefill.HasField("snapshot")) == (
        PREFILL,
        cluster_pb2.REPLICA_STATE_READY,
        False,
    )
    assert (decode.worker_id, decode.address, decode.node) == (worker_id, "127.0.0.1:1", "n")
    assert decode.snapshot.num_running == 3


async def test_a_new_target_is_waited_for_when_asked() -> None:
    async with serving() as served:
        started: list[Worker] = []
        served.cluster.on_start = started.append
        at_once = await served.set_target((DECODE, 2), wait=False)
        assert [pool.num_replicas for pool in at_once.target] == [1, 2]
        waiting = asyncio.create_task(served.set_target((DECODE, 2)))
        await until(served.controller, lambda status: bool(started))
        assert not waiting.done()
        started[0].become(ReplicaState.READY)
        assert [replica.state for replica in (await waiting).replicas] == [cluster_pb2.REPLICA_STATE_READY] * 3


async def test_without_prefill_replicas_decode_workers_are_mixed() -> None:
    async with serving() as served:
        status = await served.set_target((PREFILL, 0))
    assert [replica.role for replica in status.replicas] == [MIXED]


async def test_waiting_for_a_pool_that_fails_tells_why() -> None:
    async with serving() as served:
        served.cluster.on_start = lambda worker: worker.become(ReplicaState.FAILED, "no memory")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.set_target((DECODE, 2))
        error = error_from_rpc(caught.value)
        assert isinstance(error, UnavailableError)
        assert error.message == "the target is not reached: decode-1: no memory"
        status = await served.stub.GetStatus(cluster_pb2.GetStatusRequest())
        failed = [replica for replica in status.replicas if replica.state == cluster_pb2.REPLICA_STATE_FAILED]
        assert all(replica.num_restarts >= 3 and "no memory" in replica.message for replica in failed)


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ([(DECODE, 0)], InvalidArgumentError, "decode must have 1 to 1024 replicas, got 0"),
        ([(DECODE, 1), (DECODE, 2)], InvalidArgumentError, "decode is named twice"),
        ([(MIXED, 1)], InvalidArgumentError, "mixed is no pool; pools are prefill and decode"),
        ([(DECODE, 9)], ResourceExhaustedError, "the cluster is too small: wanted 2.5 CPUs ("),
    ],
)
async def test_a_target_that_cannot_be_is_refused(
    sizes: list[tuple[worker_pb2.WorkerRole, int]], error: type[Exception], message: str
) -> None:
    async with serving() as served:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.set_target(*sizes)
        assert isinstance(error_from_rpc(caught.value), error)
        assert message in (caught.value.details() or "")
        assert len(await reached(served.controller)) == 2


async def test_a_drain_answers_when_done_or_before_its_deadline() -> None:
    async with serving() as served:
        prefill, decode = await reached(served.controller)
        for worker_id in (prefill, decode):
            served.cluster.workers[worker_id].load = 2
        request = cluster_pb2.DrainRequest(worker_id=prefill)
        assert (await served.stub.Drain(request, timeout=2)).num_left == 2
        drain = served.stub.Drain(cluster_pb2.DrainRequest(worker_id=decode))
        await until(served.controller, lambda status: is_draining(status, decode))
        served.cluster.finish(decode)
        assert (await drain).num_left == 0


def is_draining(status: ControllerStatus, worker_id: str) -> bool:
    return any(row.worker_id == worker_id and row.state is ReplicaState.DRAINING for row in status.replicas)


async def test_those_who_wait_are_bounded_and_do_not_keep_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_service, "MAX_WAITING", 2)
    async with serving() as served:
        prefill, decode = await reached(served.controller)
        for worker_id in (prefill, decode):
            served.cluster.workers[worker_id].load = 1
        drains = [served.stub.Drain(cluster_pb2.DrainRequest(worker_id=name)) for name in (prefill, decode)]
        await until(served.controller, lambda status: is_draining(status, prefill) and is_draining(status, decode))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.set_target((DECODE, 2))
        assert isinstance(error_from_rpc(caught.value), ResourceExhaustedError)
        assert served.controller.target.decode == 1
        assert (await served.set_target((DECODE, 2), wait=False)).target[1].num_replicas == 2
        for name in (prefill, decode):
            served.cluster.finish(name)
        assert [(await drain).num_left for drain in drains] == [0, 0]
        await served.set_target((DECODE, 1))


async def test_a_drain_of_nobody_is_refused() -> None:
    async with serving() as served:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.stub.Drain(cluster_pb2.DrainRequest(worker_id="nobody"))
        assert isinstance(error_from_rpc(caught.value), NotFoundError)


async def test_stop_is_passed_on() -> None:
    async with serving() as served:
        await served.stub.Stop(cluster_pb2.StopRequest())
        assert served.stopped.is_set()
