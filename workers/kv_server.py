"""The ``KvTransfer`` service of a rank beyond the first: takes pushed KV, on a thread with its own event loop."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from typing import Any

import grpc
import grpc.aio

from ..collectives.kv_transfer import KvReceiver, KvTransferServicer
from ..proto.fuseline.v1 import kv_transfer_pb2 as pb
from ..runtime.errors import UnavailableError
from .grpc_options import SERVER_OPTIONS

_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 5.0
Context = grpc.aio.ServicerContext[Any, Any]


class KvServer:
    """Serves until ``close``.

    Attributes:
        address: ``host:port``.

    Raises:
        UnavailableError: it cannot listen on ``host``.
    """

    def __init__(self, receiver: KvReceiver, host: str) -> None:
        self._receiver = receiver
        self._host = host
        self._started: Future[str] = Future()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="kv-server", daemon=True)
        self._thread.start()
        self.address = self._started.result(_START_TIMEOUT_S)

    def close(self) -> None:
        """Stop serving; idempotent."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(_STOP_TIMEOUT_S)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        server = grpc.aio.server(options=SERVER_OPTIONS)
        servicer = KvTransferServicer(self._receiver, _refuse_commit, _refuse_abort)
        servicer.add_to_server(server)
        try:
            port = server.add_insecure_port(f"{self._host}:0")
            await server.start()
        except RuntimeError as error:
            self._started.set_exception(UnavailableError(f"cannot take KV on {self._host}: {error}"))
            return
        self._started.set_result(f"{self._host}:{port}")
        await self._stop.wait()
        await server.stop(0.5)
        servicer.close()


async def _refuse_commit(_: pb.CommitRequest, context: Context) -> pb.CommitResponse:
    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the group's first rank takes commits")


async def _refuse_abort(_: pb.AbortRequest, context: Context) -> pb.AbortResponse:
    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the group's first rank takes aborts")
