"""A worker that speaks the wire and does what a test tells it: for what real workers do only by accident."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from fuseline.cluster.membership import ReplicaInfo, ReplicaState, StaticMembership
from fuseline.cluster.worker_pool import WorkerPool
from fuseline.proto.fuseline.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from fuseline.runtime.role import WorkerRole
from fuseline.tests.timing import PROMPTLY_S

Output = common_pb2.SequenceOutput
LENGTH = common_pb2.FINISH_REASON_LENGTH
ROLES = {
    WorkerRole.PREFILL: worker_pb2.WORKER_ROLE_PREFILL,
    WorkerRole.DECODE: worker_pb2.WORKER_ROLE_DECODE,
    WorkerRole.MIXED: worker_pb2.WORKER_ROLE_MIXED,
}


def first_token(*tokens: int, finish_reason: common_pb2.FinishReason = LENGTH) -> worker_pb2.PrefillEvent:
    """The prefill worker's only output; one token means that it does not end the sequence."""
    reason = finish_reason if len(tokens) > 1 else common_pb2.FINISH_REASON_UNSPECIFIED
    return worker_pb2.PrefillEvent(first_token=Output(token_ids=tokens[:1], finish_reason=reason))


def reserved() -> worker_pb2.DecodeEvent:
    return worker_pb2.DecodeEvent(reserved=worker_pb2.KvReservation(reservation_id="r"))


def output(*tokens: int, last: bool = False) -> worker_pb2.DecodeEvent:
    reason = LENGTH if last else common_pb2.FINISH_REASON_UNSPECIFIED
    return worker_pb2.DecodeEvent(output=Output(token_ids=tokens, finish_reason=reason))


class ScriptedWorker(
    worker_pb2_grpc.WorkerServicer, worker_pb2_grpc.PrefillServiceServicer, worker_pb2_grpc.DecodeServiceServicer
):
    """``script`` holds, per call, what to do: send an event, wait for one, or fail with a status code.

    Attributes:
        script: one list of steps per call, used up in order.
        requests: what the calls asked.
        ended: how the calls ended: "done", "cancelled" or "failed".
        called: set by the first call.
    """

    def __init__(self, worker_id: str, role: WorkerRole, *script: list[Any], **snapshot: Any) -> None:
        self.worker_id = worker_id
        self.role = role
        self.script = list(script)
        self.requests: list[Any] = []
        self.ended: list[str] = []
        self.called = asyncio.Event()
        self._changed = asyncio.Event()
        self._snapshot = worker_pb2.WorkerSnapshot(worker_id=worker_id, role=ROLES[role])
        self._server = grpc.aio.server()
        self.address = ""
        for name, value in ({"num_total_blocks": 100, "num_free_blocks": 100, "max_num_seqs": 8} | snapshot).items():
            setattr(self._snapshot, name, value)

    async def __aenter__(self) -> ScriptedWorker:
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self._server)
        worker_pb2_grpc.add_PrefillServiceServicer_to_server(self, self._server)
        worker_pb2_grpc.add_DecodeServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(None)

    @property
    def info(self) -> ReplicaInfo:
        return ReplicaInfo(self.worker_id, self.role, ReplicaState.READY, self.address)

    def publish(self, **fields: Any) -> None:
        """Send a snapshot with these changes to whoever watches."""
        for name, value in fields.items():
            setattr(self._snapshot, name, value)
        self._changed.set()
        self._changed = asyncio.Event()

    async def Watch(self, request: object, context: object) -> AsyncIterator[worker_pb2.WorkerSnapshot]:
        while True:
            changed = self._changed
            yield self._snapshot
            await changed.wait()

    async def Prefill(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for event in self._play(request, context):
            yield event

    async def Decode(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for event in self._play(request, context):
            yield event

    async def _play(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.requests.append(request)
        self.called.set()
        ended = "cancelled"
        try:
            for step in self.script.pop(0):
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif isinstance(step, grpc.StatusCode):
                    ended = "failed"
                    await context.abort(step, "as the test says")
                else:
                    yield step
            ended = "done"
        finally:
            self.ended.append(ended)


async def until(condition: Callable[[], bool], timeout_s: float = PROMPTLY_S) -> None:
    """Wait for something that no event tells of."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@asynccontextmanager
async def following(*workers: ScriptedWorker) -> AsyncIterator[tuple[WorkerPool, StaticMembership]]:
    """The workers at work, and a pool that has heard of all of them."""
    async with AsyncExitStack() as stack:
        for worker in workers:
            await stack.enter_async_context(worker)
        membership = StaticMembership(worker.info for worker in workers)
        pool = WorkerPool(membership)
        stack.push_async_callback(pool.close)
        pool.start()
        await until(lambda: len(pool.replicas()) == len(workers))
        yield pool, membership
