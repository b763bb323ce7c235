"""The ``KvTransfer`` service of a decode rank, on grpc.aio. Checks and copies run on threads, never on the loop."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias

import grpc
import numpy as np

from ...proto.fuseline.v1 import kv_transfer_pb2 as pb
from ...runtime.errors import InvalidArgumentError, UnavailableError
from ..segment import Bytes, attach_segment
from .malloc import keep_message_memory
from .pieces import PieceRefusedError
from .receiver import KvReceiver
from .wire import Parcel, decode_push

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
OnCommit = Callable[[pb.CommitRequest, Context], Awaitable[pb.CommitResponse]]
OnAbort = Callable[[pb.AbortRequest, Context], Awaitable[pb.AbortResponse]]

SERVICE = "fuseline.v1.KvTransfer"
PUSH = f"/{SERVICE}/Push"
NUM_COPY_THREADS = 4
MAX_READ_AHEAD = 3  # requests of a stream that are held: one is acted on, the others wait
MAX_TURN = 4  # requests of a stream that a thread acts on before it lets another stream have it


class KvTransferServicer:
    """Answers Push from a receiver; Commit and Abort go to the callbacks, which end their calls as they see fit.

    Add it to a server by ``add_to_server``, not by the generated function: Push handles raw bytes. A server's default
    message limit of 4 MiB is enough. Making one sets up this process' allocator, see ``keep_message_memory``.
    """

    def __init__(self, receiver: KvReceiver, on_commit: OnCommit, on_abort: OnAbort) -> None:
        keep_message_memory()
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
        stream = _PushStream(PushSession(self._receiver), self._threads)
        reading = asyncio.create_task(stream.read(requests))
        try:
            async for answer in stream.answers():
                yield answer
        except InvalidArgumentError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.message)
        finally:
            reading.cancel()
            stream.drop_waiting()


class PushSession:
    """What one sender's requests mean: the segment that it attached, if any, and its parcels."""

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


class _PushStream:
    """Runs a session: the loop reads ahead while a thread checks and copies.

    One thread at a time works for a stream, so that its requests are acted on in order; after a few it lets other
    streams have the thread. Everything is the loop's but what the lock guards.
    """

    def __init__(self, session: PushSession, threads: ThreadPoolExecutor) -> None:
        self._session = session
        self._threads = threads
        self._loop = asyncio.get_running_loop()
        self._room = asyncio.Semaphore(MAX_READ_AHEAD)
        self._changed = asyncio.Event()
        self._num_unanswered = 0
        self._ended = False
        self._answers: deque[pb.PushResponse] = deque()
        self._failure: BaseException | None = None
        self._lock = threading.Lock()  # guards what follows
        self._waiting: deque[bytes] = deque()
        self._working = False

    async def read(self, requests: AsyncIterator[bytes]) -> None:
        """Have every request acted on; a bounded number of them wait."""
        try:
            async for message in requests:
                await self._room.acquire()
                self._num_unanswered += 1
                with self._lock:
                    self._waiting.append(message)
                    idle, self._working = not self._working, True
                if idle:
                    self._start_work()
        finally:
            self._ended = True
            self._changed.set()

    async def answers(self) -> AsyncIterator[pb.PushResponse]:
        """What to answer, in order, until all requests are answered.

        Raises:
            InvalidArgumentError: a request has no meaning.
        """
        while self._failure is None:
            self._changed.clear()
            while self._answers:
                self._num_unanswered -= 1
                yield self._answers.popleft()
            if self._ended and not self._num_unanswered:
                return
            await self._changed.wait()
        raise self._failure

    def drop_waiting(self) -> None:
        """Act on no further request."""
        with self._lock:
            self._waiting.clear()

    def _start_work(self) -> None:
        self._threads.submit(self._work).add_done_callback(self._work_ended)

    def _work(self) -> bool:
        """Act on some requests; whether more wait. Runs on a thread."""
        for _ in range(MAX_TURN):
            with self._lock:
                if not self._waiting:
                    self._working = False
                    return False
                message = self._waiting.popleft()
            self._answers.append(self._session.take(message))
            self._loop.call_soon_threadsafe(self._answered)
        return True

    def _work_ended(self, work: Future[bool]) -> None:
        self._failure = work.exception()
        if self._failure is not None:
            self._loop.call_soon_threadsafe(self._changed.set)
        elif work.result():
            self._start_work()

    def _answered(self) -> None:
        self._room.release()
        self._changed.set()
