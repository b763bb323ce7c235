"""A place between prefill and decode from which tests look at the KV stream, stop it, or tamper with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from fuseline.proto.fuseline.v1 import kv_transfer_pb2, worker_pb2
from fuseline.tests.workers.worker_cases import Worker


class KvProxy:
    """Stands between prefill and decode and does to the KV stream what a test wants.

    Attributes:
        address: to be put into a reservation.
        on_push: what becomes of a request: bytes to forward, or None to acknowledge it without forwarding.
        on_commit: what becomes of a commit.
        arrived: set when the first parcel has come.
        may_go_on: while cleared, parcels wait.
    """

    def __init__(self, target: Worker) -> None:
        self.address = ""
        self.on_push: Callable[[bytes], bytes | None] = lambda message: message
        self.on_commit: Callable[[kv_transfer_pb2.CommitRequest], kv_transfer_pb2.CommitRequest] = lambda m: m
        self.arrived = asyncio.Event()
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()
        self._target = target

    def add_to_server(self, server: grpc.aio.Server) -> None:
        pb = kv_transfer_pb2
        handlers = {
            "Push": grpc.stream_stream_rpc_method_handler(self._push),
            "Commit": grpc.unary_unary_rpc_method_handler(
                self._commit, pb.CommitRequest.FromString, pb.CommitResponse.SerializeToString
            ),
            "Abort": grpc.unary_unary_rpc_method_handler(
                self._abort, pb.AbortRequest.FromString, pb.AbortResponse.SerializeToString
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("fuseline.v1.KvTransfer", handlers),))

    async def _push(self, messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        channel: Any = self._target.channel
        call = channel.stream_stream("/fuseline.v1.KvTransfer/Push")()
        async for message in messages:
            self.arrived.set()
            await self.may_go_on.wait()
            changed = self.on_push(message)
            if changed is None:
                parcel = kv_transfer_pb2.PushRequest.FromString(message)
                yield kv_transfer_pb2.PushResponse(parcel_id=parcel.parcel_id).SerializeToString()
                continue
            await call.write(changed)
            yield await call.read()

    async def _commit(self, message: kv_transfer_pb2.CommitRequest, context: Any) -> Any:
        try:
            return await self._target.transfer.Commit(self.on_commit(message))
        except grpc.aio.AioRpcError as error:
            metadata: Any = error.trailing_metadata()
            return await context.abort(error.code(), error.details(), tuple(metadata))

    async def _abort(self, message: kv_transfer_pb2.AbortRequest, context: Any) -> Any:
        return await self._target.transfer.Abort(message)


@asynccontextmanager
async def kv_proxy(target: Worker) -> AsyncIterator[KvProxy]:
    proxy, server = KvProxy(target), grpc.aio.server()
    proxy.add_to_server(server)
    proxy.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield proxy
    finally:
        await server.stop(None)


def through(proxy: KvProxy, reservation: worker_pb2.KvReservation) -> worker_pb2.KvReservation:
    """The reservation with the proxy in the decode worker's place; no shared memory."""
    reservation.endpoints[0].address = proxy.address
    reservation.endpoints[0].host_id = "elsewhere"
    return reservation
