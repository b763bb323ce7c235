"""A gateway over real workers in this process: real engines, real KV transfer, real sockets, no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fuseline.cluster.client import AsyncClient
from fuseline.cluster.cluster_service import ClusterService
from fuseline.cluster.gateway import Gateway, GatewayConfig
from fuseline.cluster.membership import ReplicaInfo, ReplicaState, StaticMembership
from fuseline.proto.fuseline.v1 import worker_pb2
from fuseline.runtime.config import SchedulerConfig
from fuseline.runtime.role import WorkerRole
from fuseline.tests.cluster.scripted_worker import until
from fuseline.tests.timing import PATIENTLY_S
from fuseline.workers.group import GroupConfig, ModelGroup
from fuseline.workers.loader import model_info, resolve_model
from fuseline.workers.server import WorkerServer
from fuseline.workers.tokenizer import Tokenizer

MODEL_PATH = resolve_model("demo")
MODEL = model_info(MODEL_PATH)
TOKENIZER = Tokenizer.load(MODEL_PATH)


@dataclass
class LiveCluster:
    gateway: Gateway
    address: str
    client: AsyncClient
    membership: StaticMembership
    infos: list[ReplicaInfo]

    def snapshots(self) -> dict[str, worker_pb2.WorkerSnapshot]:
        return self.gateway.pool.snapshots()

    def is_empty(self) -> bool:
        """Whether no worker holds a block or a sequence, going by what they say."""
        return all(
            s.num_free_blocks == s.num_total_blocks
            and not s.num_running
            and not s.num_waiting
            and not s.num_leaked_blocks
            for s in self.snapshots().values()
        )

    async def empties(self) -> None:
        await until(self.is_empty)


def group_config(**fields: Any) -> GroupConfig:
    return GroupConfig("demo", num_threads=1, device="cpu", transfers_kv=True, **fields)


@asynccontextmanager
async def worker(worker_id: str, role: WorkerRole, config: GroupConfig) -> AsyncIterator[ReplicaInfo]:
    group = await asyncio.to_thread(ModelGroup.start, config)
    server = WorkerServer(worker_id, role, group)
    await server.start()
    try:
        yield ReplicaInfo(worker_id, role, ReplicaState.READY, server.address)
    finally:
        await server.stop(0)


@asynccontextmanager
async def gateway_over(
    infos: list[ReplicaInfo], cluster_service: ClusterService | None = None, **config: Any
) -> AsyncIterator[LiveCluster]:
    """With workers to serve, it waits for them."""
    membership = StaticMembership(infos)
    gateway = Gateway(GatewayConfig(**config), MODEL, TOKENIZER, membership, cluster_service)
    address = f"127.0.0.1:{await gateway.start()}"
    try:
        async with AsyncClient(address) as client:
            if infos:
                await asyncio.wait_for(gateway.wait_ready(), PATIENTLY_S)
            yield LiveCluster(gateway, address, client, membership, infos)
    finally:
        await gateway.stop(0)


@asynccontextmanager
async def live_cluster(
    prefill: int = 1, decode: int = 1, num_kv_blocks: int = 512, **config: Any
) -> AsyncIterator[LiveCluster]:
    """Workers of a role for each pool; without prefill workers, the others do everything."""
    torch.set_num_threads(1)
    scheduler = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=512)
    limits = group_config(scheduler=scheduler, num_kv_blocks=num_kv_blocks)
    async with AsyncExitStack() as stack:
        infos = []
        decode_role = WorkerRole.DECODE if prefill else WorkerRole.MIXED
        for role, count in ((WorkerRole.PREFILL, prefill), (decode_role, decode)):
            for index in range(count):
                infos.append(await stack.enter_async_context(worker(f"{role}-{index}", role, limits)))
        yield await stack.enter_async_context(gateway_over(infos, **config))
