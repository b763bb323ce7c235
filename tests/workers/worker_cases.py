"""Real workers in this process, and a client that does what the gateway does, for tests of the services."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fuseline.collectives.kv_transfer import KvSender
from fuseline.proto.fuseline.v1 import kv_transfer_pb2_grpc, worker_pb2, worker_pb2_grpc
from fuseline.runtime.config import SchedulerConfig
from fuseline.runtime.engine_stats import EngineStats
from fuseline.runtime.errors import FuselineError
from fuseline.runtime.request import FinishReason, Request, SequenceOutput
from fuseline.runtime.role import WorkerRole
from fuseline.runtime.sampling_params import SamplingParams
from fuseline.runtime.sharding import ParallelConfig
from fuseline.tests.timing import PROMPTLY_S
from fuseline.workers import wire
from fuseline.workers.group import GroupConfig, ModelGroup
from fuseline.workers.grpc_errors import error_from_rpc
from fuseline.workers.grpc_options import CHANNEL_OPTIONS
from fuseline.workers.server import WorkerServer

VOCAB_SIZE = 4096
_names = itertools.count()


class Client:
    """Stubs of one worker."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self.prefill = worker_pb2_grpc.PrefillServiceStub(self.channel)
        self.decode = worker_pb2_grpc.DecodeServiceStub(self.channel)
        self.worker = worker_pb2_grpc.WorkerStub(self.channel)
        self.transfer = kv_transfer_pb2_grpc.KvTransferStub(self.channel)

    async def snapshot(self) -> worker_pb2.WorkerSnapshot:
        call = self.worker.Watch(worker_pb2.WatchRequest())
        snapshot: worker_pb2.WorkerSnapshot = await anext(aiter(call))
        call.cancel()
        return snapshot

    async def health(self, service: str) -> int:
        """As ``grpc.health.v1`` tells it."""
        stub = health_pb2_grpc.HealthStub(self.channel)
        answer: health_pb2.HealthCheckResponse = await stub.Check(health_pb2.HealthCheckRequest(service=service))
        return int(answer.status)


class Worker(Client):
    """A server in this process, with its stubs."""

    def __init__(self, server: WorkerServer) -> None:
        super().__init__(server.address)
        self.server = server
        self.group = server._group
        assert self.group.kv_receiver is not None
        self.receiver = self.group.kv_receiver
        first_rank: Any = self.group.executor._links[-1]
        self.sender: KvSender = first_rank._worker._sender
        self.engine = server._engine

    async def until(self, happened: Callable[[EngineStats], bool]) -> None:
        """Wait for the engine to come into a state."""
        changed = asyncio.Event()
        self.engine.watchers.add(changed)
        try:
            while not happened(await self.engine.stats()):
                await changed.wait()
                changed.clear()
        finally:
            self.engine.watchers.discard(changed)

    async def released(self, within_s: float = PROMPTLY_S) -> None:
        """Nothing is held, in the engine's books and the ranks', within so long."""
        start = time.monotonic()
        while True:
            stats = await self.engine.stats()
            held = {
                "blocks": stats.num_total_blocks - stats.num_free_blocks,
                "leaked": stats.num_leaked_blocks,
                "sequences": stats.num_running + stats.num_waiting + stats.num_reserved + stats.num_held,
                "leases": self.server.num_live,
                "reservations": self.receiver.stats().num_open,
                "handoffs": self.sender.stats().num_open,
            }
            if not any(held.values()):
                break
            assert time.monotonic() - start < within_s, held
            await asyncio.sleep(0.01)
        await self.engine.call(lambda engine: engine.check_integrity())


async def both_released(prefill: Worker, decode: Worker) -> None:
    await asyncio.gather(prefill.released(), decode.released())


@asynccontextmanager
async def worker(
    role: WorkerRole,
    tp: int = 1,
    pp: int = 1,
    *,
    num_kv_blocks: int = 256,
    max_num_batched_tokens: int = 256,
    handoff_timeout_s: float = 30.0,
    block_size: int = 16,
    quantization: str = "none",
    kv_cache_dtype: str = "auto",
) -> AsyncIterator[Worker]:
    """A worker of the demo model in float32, its first rank in this process. Leaves nothing held behind."""
    config = GroupConfig(
        "demo",
        device="cpu",
        dtype="float32",
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        parallel=ParallelConfig(tp, pp),
        scheduler=SchedulerConfig(16, max_num_batched_tokens, 32, handoff_timeout_s=handoff_timeout_s),
        block_size=block_size,
        num_kv_blocks=num_kv_blocks,
        num_threads=1,
        transfers_kv=True,
        start_timeout_s=120,
        step_timeout_s=60,
    )
    group = await asyncio.to_thread(ModelGroup.start, config)
    server = WorkerServer(f"{role}-{tp}x{pp}", role, group)
    await server.start()
    try:
        started = Worker(server)
        yield started
        await started.channel.close(None)
    finally:
        await server.stop(0)


def make_request(prompt_token_ids: list[int], *, seed: int = 0, epoch: int = 0, **params: Any) -> Request:
    """A request with a fresh name; greedy and without an early end unless told otherwise."""
    sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **params})
    return Request(f"request-{next(_names)}", tuple(prompt_token_ids), sampling, seed=seed, epoch=epoch)


def fresh_prompt(num_tokens: int) -> list[int]:
    """Token ids that no prefix cache has seen."""
    return prompt_of(num_tokens, 10_000 + next(_names))


def prompt_of(num_tokens: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    return [int(token) for token in np.random.default_rng(seed).integers(1, VOCAB_SIZE, num_tokens)]


@dataclass
class Generated:
    """What a request gave."""

    outputs: list[SequenceOutput] = field(default_factory=list)
    reservation: worker_pb2.KvReservation | None = None
    handed_off: worker_pb2.HandedOff | None = None

    @property
    def token_ids(self) -> list[int]:
        return [token for output in self.outputs for token in output.token_ids]

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.outputs[-1].finish_reason


async def compute_locally(client: Client, request: Request, timeout: float = 60) -> Generated:
    """The whole request on one worker."""
    generated = Generated()
    message = worker_pb2.DecodeRequest(sequence=wire.request_to_wire(request), local_prefill=True)
    async for event in client.decode.Decode(message, timeout=timeout):
        generated.outputs.append(wire.output_from_wire(event.output, request.request_id))
    return generated


@dataclass
class Decoding:
    """A decode stream that has its reservation."""

    call: Any
    events: AsyncIterator[worker_pb2.DecodeEvent]
    reservation: worker_pb2.KvReservation


async def open_decode(client: Client, request: Request, timeout: float = 60) -> Decoding:
    """A decode stream and its reservation."""
    call = client.decode.Decode(worker_pb2.DecodeRequest(sequence=wire.request_to_wire(request)), timeout=timeout)
    events = aiter(call)
    return Decoding(call, events, (await anext(events)).reserved)


def open_prefill(
    client: Client, request: Request, reservation: worker_pb2.KvReservation | None, timeout: float = 60
) -> Any:
    """A prefill stream."""
    message = worker_pb2.PrefillRequest(sequence=wire.request_to_wire(request), reservation=reservation)
    return client.prefill.Prefill(message, timeout=timeout)


async def disaggregate(prefill: Client, decode: Client, request: Request) -> Generated:
    """The request over two workers, as the gateway runs it."""
    generated = Generated()
    decoding = await open_decode(decode, request)
    generated.reservation = decoding.reservation
    try:
        async for event in open_prefill(prefill, request, decoding.reservation):
            if event.WhichOneof("event") == "handed_off":
                generated.handed_off = event.handed_off
            else:
                generated.outputs.append(wire.output_from_wire(event.first_token, request.request_id))
        if generated.finish_reason is None:
            async for event in decoding.events:
                generated.outputs.append(wire.output_from_wire(event.output, request.request_id))
    finally:
        decoding.call.cancel()
    return generated


async def error_of(events: AsyncIterable[Any], within_s: float = PROMPTLY_S) -> FuselineError:
    """The typed error with which a stream ends, after whatever came before."""
    try:
        async with asyncio.timeout(within_s):
            async for _ in events:
                pass
    except grpc.RpcError as error:
        return error_from_rpc(error)
    raise AssertionError("the call ended well")
