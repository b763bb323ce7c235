"""What is decided before anything is started on Ray; the rest is in test_ray_cluster.py."""

import asyncio
import subprocess
from dataclasses import replace

import grpc.aio
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fuseline.cluster.cluster_config import ClusterConfig, PoolConfig
from fuseline.cluster.placement import Resources
from fuseline.cluster.ray_backend import resolve
from fuseline.runtime.errors import InvalidArgumentError, ResourceExhaustedError
from fuseline.runtime.sharding import ParallelConfig

CONFIG = ClusterConfig(prefill=PoolConfig(1), decode=PoolConfig(2))
LAPTOP, GPU_NODE = Resources.of(2, 0), Resources.of(64, 8)


@pytest.mark.parametrize(
    ("parallel", "node", "device"),
    [
        (ParallelConfig(), LAPTOP, "cpu"),
        (ParallelConfig(), GPU_NODE, "cuda"),
        (ParallelConfig(2, 2), GPU_NODE, "cpu"),  # 9 GPUs would be needed
        (ParallelConfig(), Resources.of(2, 3), "cpu"),  # ranks on GPUs want a whole core each
    ],
)
def test_gpus_are_used_when_there_are_enough(parallel: ParallelConfig, node: Resources, device: str) -> None:
    config = replace(CONFIG, decode=PoolConfig(2, parallel))
    assert resolve(config, [node]) == config.on(device)


def test_a_cluster_that_is_too_small_is_refused_with_numbers() -> None:
    with pytest.raises(ResourceExhaustedError, match=r"wanted 3 CPUs and 3 GPUs .* found 2 CPUs on 1 node"):
        resolve(CONFIG.on("cuda"), [LAPTOP])
    with pytest.raises(ResourceExhaustedError, match=r"wanted 12\.25 CPUs .* found 2 CPUs on 1 node"):
        resolve(replace(CONFIG, decode=PoolConfig(48)), [LAPTOP])


def test_several_nodes_want_workers_that_can_be_reached() -> None:
    with pytest.raises(InvalidArgumentError, match="the Ray cluster has 2 nodes, but workers listen on loopback"):
        resolve(CONFIG, [LAPTOP, LAPTOP])
    reachable = replace(CONFIG, bind_node_address=True)
    assert resolve(reachable, [LAPTOP, LAPTOP]) == reachable.on("cpu")


async def test_processes_start_as_ray_starts_them_while_grpc_is_at_work() -> None:
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)  # type: ignore[attr-defined]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    def start() -> int:
        # Code to run in the child makes Python fork in full, with everybody's handlers.
        return subprocess.Popen(["true"], preexec_fn=lambda: None).wait(10)  # noqa: PLW1509

    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        started = asyncio.gather(*(asyncio.to_thread(start) for _ in range(60)))
        while not started.done():
            await asyncio.gather(*(stub.Check(health_pb2.HealthCheckRequest()) for _ in range(8)))
        assert await started == [0] * 60
    await server.stop(None)
