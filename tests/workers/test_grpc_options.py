"""A call on which nothing is said for long stays open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from fuseline.workers.grpc_options import channel_options, server_options

FAST_S = 0.1  # gRPC pings once a second at most
LONG_S = 4.5


async def wait_for_ever(_: bytes, context: Any) -> None:
    await asyncio.Event().wait()


@asynccontextmanager
async def silent_call() -> AsyncIterator[Any]:
    server = grpc.aio.server(options=server_options(FAST_S))
    handlers = {"Wait": grpc.unary_stream_rpc_method_handler(wait_for_ever)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=channel_options(FAST_S)) as channel:
        untyped: Any = channel
        yield untyped.unary_stream("/test/Wait")(b"")
    await server.stop(None)


async def test_a_silent_call_outlives_many_keepalive_pings() -> None:
    """By default a server ends a connection after a few pings of a client that has nothing to say."""
    async with silent_call() as call:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(LONG_S):
                await call.read()
