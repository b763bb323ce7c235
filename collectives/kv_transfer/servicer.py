"""The ``KvTransfer`` service of a decode rank, on grpc.aio. Checks and copies run on threads, never on the loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import grpc
import numpy as np

from ...proto.fuseline.v1 import kv_transfer_pb2 as pb
from ...runtime.errors import InvalidArgumentError, UnavailableError
from .pieces import Bytes, PieceRefusedError
from .receiver import KvReceiver
from .segment import attach_segment
from .wire import Parcel, decode_push

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
OnCommit = Callable[[pb.CommitRequest, Context], Awaitable[pb.CommitResponse]]
OnAbort = Callable[[pb.AbortRequest, Context], Awaitable[pb.AbortResponse]]

SERVICE = "fuseline.v1.KvTransfer"
PUSH = f"/{SERVICE}/Push"
NUM_COPY_THREADS = 4


class KvTransferServicer:
    """Answers Push from a receiver; Commit and Abort go to the callbacks, which end their calls as they see fit.

    Add it to a server by ``add_to_server``, not by the generated function: Push handles raw bytes. A server's default
    message limit of 4 MiB is enough.
    """

    def __init__(self, receiver: KvReceiver, on_commit: OnCommit, on_abort: OnAbort) -> None:
        self._receiver = receiver
        self._on_commit = on_commit
        self._on_abort = on_abort
        self._threads = ThreadPoolExecutor(NUM_COPY_THREADS, thread_name_prefix="kv-receive")

    def add_to_server(self, server: grpc.aio.Server) -> None:
        """Register the three methods."""
        handlers = {
            "Push": grpc.stream_stream_rpc_method_handler(self._push, None, pb.PushResponse.SerializeToString),
            "Commit": grpc.unary_unary_rpc_method_handler(
                self._on_commit, pb.CommitRequest.FromString, pb.CommitResponse.SerializeToString
            ),
            "Abort": grpc.unary_unary_rpc_method_handler(
                self._on_abort, pb.AbortRequest.FromString, pb.AbortResponse.SerializeToString
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    def close(self) -> None:
        """Let the threads end; after the server has stopped."""
        self._threads.shutdown()

    async def _push(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[pb.PushResponse]:
        stream = _PushStream(self._receiver)
        loop = asyncio.get_running_loop()
        async for message in requests:
            try:
                response = await loop.run_in_executor(self._threads, stream.take, message)
            except InvalidArgumentError as error:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.message)
            yield response


class _PushStream:
    """One sender's stream: its segment, if it attached one."""

    def __init__(self, receiver: KvReceiver) -> None:
        self._receiver = receiver
        self._segment: Bytes = np.empty(0, np.uint8)

    def take(self, message: bytes) -> pb.PushResponse:
        """Act on one request.

        Raises:
            InvalidArgumentError: the message has no meaning; the stream must end.
        """
        request = decode_push(message)
        if isinstance(request, Parcel):
            return self._take_parcel(request)
        try:
            self._segment = attach_segment(request.pid, request.fd, request.name, request.num_bytes)
        except UnavailableError:
            return pb.PushResponse(attached=False)  # the sender goes on with inline data
        return pb.PushResponse(attached=True)

    def _take_parcel(self, parcel: Parcel) -> pb.PushResponse:
        data = self._segment[parcel.segment_offset :] if parcel.inline is None else parcel.inline
        response = pb.PushResponse(parcel_id=parcel.parcel_id)
        position = 0
        for index, piece in enumerate(parcel.pieces):
            try:
                self._receiver.accept(piece, data[position : position + piece.num_bytes])
            except PieceRefusedError as refused:
                response.refused.add(index=index, reason=f"REFUSAL_{refused.reason.name}", message=refused.message)
            position += piece.num_bytes
        return response
