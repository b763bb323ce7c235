"""Clients of a running cluster, synchronous and asyncio. Light: importing them loads neither torch nor Ray.

A generation is a stream; leaving it (``close``, the end of its ``with``, garbage collection) cancels the request, and
the cluster frees what it holds. Errors are the classes of ``runtime/errors.py``, with the gateway's details.
CancelledError means that this client cancelled; a call that the other side cancels is UnavailableError.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from ..proto.fuseline.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc
from ..runtime.errors import (
    CancelledError,
    DeadlineExceededError,
    ErrorCode,
    FuselineError,
    InvalidArgumentError,
    UnavailableError,
    make_error,
)
from ..runtime.sampling_params import SamplingParams
from ..workers.grpc_errors import error_from_rpc, is_being_cancelled
from ..workers.grpc_options import CHANNEL_OPTIONS
from ..workers.prompts import Prompt
from .generation import (
    GenerateChunk,
    GenerateResult,
    ServedModel,
    chunk_from_wire,
    collect,
    generate_request,
    model_from_wire,
)
from .status import ClusterStatus, role_to_wire, status_from_wire
from .wording import counted

DEFAULT_ADDRESS = "127.0.0.1:50051"
# Long enough for any healthy gateway; without it a call to a host that swallows packets would hang.
CONTROL_TIMEOUT_S = 10.0
LEFT = "the request was cancelled by its client"
CLOSED = "the client was closed"
_ADDRESS = re.compile(r"[^\s/]+:(\d{1,5})")  # no URL: gRPC would look up a host named http


@dataclass(slots=True)
class _Door:
    """The far end of a client's channel, and whether the client has closed its own."""

    address: str
    is_closed: bool = False

    def check_open(self) -> None:
        if self.is_closed:
            raise UnavailableError("the client is closed")


class _Stream:
    """What both kinds of stream share."""

    def __init__(self, call: Any, door: _Door) -> None:
        self._call = call
        self._door = door
        self._is_left = False
        self._num_tokens = 0

    @property
    def _is_cancelled(self) -> bool:
        return self._is_left or self._door.is_closed

    def _leave(self) -> None:
        self._is_left = True
        self._call.cancel()

    def _chunk(self, message: inference_pb2.GenerateResponse) -> GenerateChunk:
        chunk = chunk_from_wire(message)
        self._num_tokens += len(chunk.token_ids)
        return chunk

    def _error(self, error: grpc.RpcError) -> FuselineError:
        return _typed(error, self._door.address, self._num_tokens, is_cancelled=self._is_cancelled)


class GenerateStream(_Stream, Iterator[GenerateChunk]):
    """The chunks of one request. Use it in a ``for``; ``close`` or leave its ``with`` to cancel what is not done."""

    def __next__(self) -> GenerateChunk:
        """The next piece.

        Raises:
            FuselineError: the request failed; the class says how.
        """
        try:
            return self._chunk(next(self._call))
        except grpc.RpcError as error:
            raise self._error(error) from None

    def close(self) -> None:
        """Cancel the request; nothing happens when it is done."""
        self._leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncGenerateStream(_Stream, AsyncIterator[GenerateChunk]):
    """The same for ``async for`` and ``async with``."""

    def __init__(self, call: Any, door: _Door) -> None:
        super().__init__(call, door)
        self._messages = aiter(call)
        self._has_ended = False

    async def __anext__(self) -> GenerateChunk:
        """The next piece.

        Raises:
            FuselineError: the request failed; the class says how.
        """
        if self._is_cancelled and not self._has_ended:
            raise CancelledError(LEFT)
        try:
            with _cancelled_here(LEFT):
                return self._chunk(await anext(self._messages))
        except grpc.RpcError as error:
            raise self._error(error) from None
        except StopAsyncIteration:
            self._has_ended = True
            raise

    async def aclose(self) -> None:
        """Cancel the request; nothing happens when it is done."""
        self._leave()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class Client:
    """A synchronous client; safe to share between threads.

    Args:
        address: ``host:port`` of the gateway.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS) -> None:
        self._door = _Door(_checked(address))
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)
        self._cluster = cluster_pb2_grpc.ClusterStub(self._channel)

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        timeout: float | None = None,
        priority: int = 0,
        request_id: str = "",
        model: str = "",
        cache_salt: str = "",
    ) -> GenerateStream:
        """Start a generation and return its stream; errors of the gateway come out of the stream.

        Args:
            prompt: text, or token ids.
            timeout: seconds until the request is given up, everywhere.
            priority: lower runs first.
            request_id: the gateway draws one when empty.
            model: when given, must be the served model's name.
            cache_salt: requests share cached prefixes only with those of the same salt.

        Raises:
            InvalidArgumentError: the prompt or an option cannot be sent.
        """
        request = generate_request(
            prompt, sampling_params, request_id=request_id, model=model, priority=priority, cache_salt=cache_salt
        )
        self._door.check_open()
        return GenerateStream(self._inference.Generate(request, timeout=timeout), self._door)

    def complete(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, **options: Any
    ) -> GenerateResult:
        """Generate and wait for the whole; arguments and errors as of ``generate``."""
        with self.generate(prompt, sampling_params, **options) as stream:
            return collect(stream)

    def model_info(self, *, timeout: float = CONTROL_TIMEOUT_S) -> ServedModel:
        """What is served."""
        return model_from_wire(self._call(self._inference.GetModelInfo, inference_pb2.GetModelInfoRequest(), timeout))

    def status(self, *, timeout: float = CONTROL_TIMEOUT_S) -> ClusterStatus:
        """Target and replicas."""
        return status_from_wire(self._call(self._cluster.GetStatus, cluster_pb2.GetStatusRequest(), timeout))

    def scale(
        self,
        sizes: Mapping[str, int] | None = None,
        *,
        wait: bool = False,
        timeout: float | None = None,
        **named: int,
    ) -> ClusterStatus:
        """Set how many replicas pools should have: ``scale(decode=3)``. Pools not named keep their size.

        Args:
            wait: return when the pools are there, not at once.
            timeout: in seconds; None waits without limit when ``wait`` is set, and briefly otherwise.
        """
        request = _target(dict(sizes or {}) | named, wait)
        return status_from_wire(self._call(self._cluster.SetTarget, request, _patience(timeout, wait)))

    def stop(self, *, timeout: float = CONTROL_TIMEOUT_S) -> None:
        """End the cluster's serving processes in order."""
        self._call(self._cluster.Stop, cluster_pb2.StopRequest(), timeout)

    def close(self) -> None:
        """Close the channel; streams still open are cancelled."""
        self._door.is_closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: Any, request: Any, timeout: float | None) -> Any:
        self._door.check_open()
        try:
            return method(request, timeout=timeout)
        except grpc.RpcError as error:
            raise _typed(error, self._door.address, is_cancelled=self._door.is_closed) from None


class AsyncClient:
    """The asyncio client. Make it inside a running event loop, and use it only there.

    Args:
        address: ``host:port`` of the gateway.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS) -> None:
        self._door = _Door(_checked(address))
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._inference: Any = inference_pb2_grpc.InferenceStub(self._channel)
        self._cluster: Any = cluster_pb2_grpc.ClusterStub(self._channel)

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        timeout: float | None = None,
        priority: int = 0,
        request_id: str = "",
        model: str = "",
        cache_salt: str = "",
    ) -> AsyncGenerateStream:
        """Start a generation and return its stream; see ``Client.generate``. Not a coroutine: no ``await`` here."""
        request = generate_request(
            prompt, sampling_params, request_id=request_id, model=model, priority=priority, cache_salt=cache_salt
        )
        self._door.check_open()
        return AsyncGenerateStream(self._inference.Generate(request, timeout=timeout), self._door)

    async def complete(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, **options: Any
    ) -> GenerateResult:
        """Generate and wait for the whole; arguments and errors as of ``Client.generate``."""
        async with self.generate(prompt, sampling_params, **options) as stream:
            return collect([chunk async for chunk in stream])

    async def model_info(self, *, timeout: float = CONTROL_TIMEOUT_S) -> ServedModel:
        """What is served."""
        request = inference_pb2.GetModelInfoRequest()
        return model_from_wire(await self._call(self._inference.GetModelInfo, request, timeout))

    async def status(self, *, timeout: float = CONTROL_TIMEOUT_S) -> ClusterStatus:
        """Target and replicas."""
        return status_from_wire(await self._call(self._cluster.GetStatus, cluster_pb2.GetStatusRequest(), timeout))

    async def scale(
        self,
        sizes: Mapping[str, int] | None = None,
        *,
        wait: bool = False,
        timeout: float | None = None,
        **named: int,
    ) -> ClusterStatus:
        """Set how many replicas pools should have; see ``Client.scale``."""
        request = _target(dict(sizes or {}) | named, wait)
        return status_from_wire(await self._call(self._cluster.SetTarget, request, _patience(timeout, wait)))

    async def stop(self, *, timeout: float = CONTROL_TIMEOUT_S) -> None:
        """End the cluster's serving processes in order."""
        await self._call(self._cluster.Stop, cluster_pb2.StopRequest(), timeout)

    async def close(self) -> None:
        """Close the channel; streams still open are cancelled."""
        self._door.is_closed = True
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, method: Any, request: Any, timeout: float | None) -> Any:
        self._door.check_open()
        try:
            with _cancelled_here(CLOSED):
                return await method(request, timeout=timeout)
        except grpc.RpcError as error:
            raise _typed(error, self._door.address, is_cancelled=self._door.is_closed) from None


def _checked(address: str) -> str:
    match = _ADDRESS.fullmatch(address)
    if match is None or not 0 < int(match[1]) <= 65535:
        raise InvalidArgumentError(f"address must be host:port, got {address!r}", field="address", value=address)
    return address


def _patience(timeout: float | None, wait: bool) -> float | None:
    return CONTROL_TIMEOUT_S if timeout is None and not wait else timeout


def _target(sizes: Mapping[str, int], wait: bool) -> cluster_pb2.SetTargetRequest:
    request = cluster_pb2.SetTargetRequest(wait=wait)
    for pool, num_replicas in sizes.items():
        role = role_to_wire(pool)
        try:
            request.sizes.add(role=role, num_replicas=num_replicas)
        except (ValueError, TypeError) as error:
            raise InvalidArgumentError(
                f"{pool} must be a count of replicas, got {num_replicas!r}", field=pool, value=num_replicas
            ) from error
    return request


@contextmanager
def _cancelled_here(reason: str) -> Iterator[None]:
    """Around the wait for a call: gRPC tells that the call was cancelled as it would that the waiting task was.

    Raises:
        CancelledError: the call was, and not the task.
    """
    try:
        yield
    except asyncio.CancelledError:
        if is_being_cancelled():
            raise
        raise CancelledError(reason) from None


def _typed(error: grpc.RpcError, address: str, num_tokens: int = 0, *, is_cancelled: bool = False) -> FuselineError:
    """What a failed call means to who made it.

    Args:
        num_tokens: that the call has brought so far.
        is_cancelled: this client has cancelled it, or would have.
    """
    typed = error_from_rpc(error)
    if isinstance(typed, CancelledError):
        if is_cancelled:
            return CancelledError(LEFT)
        # A server cancels what reaches it while it stops, and its gateway what a worker cancelled.
        typed = make_error(ErrorCode.UNAVAILABLE, typed.message, typed.details)
    if isinstance(typed, UnavailableError) and not typed.details:
        # Not the gateway's words but gRPC's: nobody answers there, or the connection broke.
        lost = f"the connection to {address} was lost after {counted(num_tokens, 'token')}"
        what = lost if num_tokens else f"no answer from {address}"
        return UnavailableError(f"{what}: {_reason(typed.message)}", address=address)
    if isinstance(typed, DeadlineExceededError) and not typed.details:
        return DeadlineExceededError("the timeout passed")
    return typed


def _reason(message: str) -> str:
    """The end of gRPC's chain of causes: "Connection refused", "Socket closed"."""
    return message.rpartition(": ")[2].rstrip(")]") or "the connection broke"
