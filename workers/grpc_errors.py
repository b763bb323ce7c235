"""Fuseline's errors as gRPC statuses and back, for the asyncio and the synchronous API alike.

A status carries ``google.rpc.ErrorInfo`` (reason = code, domain = "fuseline", metadata = the error's details) and,
for a bad field, ``google.rpc.BadRequest``. Everything is cut to fit into gRPC's 8 KiB of metadata: a status that is
too long would arrive as another error altogether.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from ..runtime.errors import (
    ErrorCode,
    FuselineError,
    InternalError,
    InvalidArgumentError,
    UnavailableError,
    make_error,
)

DOMAIN = "fuseline"
DETAILS_KEY = "grpc-status-details-bin"
MAX_MESSAGE_BYTES = 800  # travels three times: percent-encoded, in the status and in BadRequest
MAX_DETAIL_BYTES = 200
MAX_DETAILS_BYTES = 1200
MAX_STATUS_BYTES = 8192  # what is parsed of a peer's

logger = logging.getLogger(__name__)

# Codes that Fuseline never sends but gRPC, a proxy or another server may.
_FOREIGN_CODES = {
    grpc.StatusCode.OUT_OF_RANGE: ErrorCode.INVALID_ARGUMENT,
    grpc.StatusCode.ABORTED: ErrorCode.UNAVAILABLE,
    grpc.StatusCode.UNIMPLEMENTED: ErrorCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNAUTHENTICATED: ErrorCode.FAILED_PRECONDITION,
    grpc.StatusCode.PERMISSION_DENIED: ErrorCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNKNOWN: ErrorCode.INTERNAL,
}


def status_of(error: FuselineError) -> status_pb2.Status:
    """The rich status of an error, cut to size."""
    message = _cut(error.message, MAX_MESSAGE_BYTES)
    status = status_pb2.Status(code=grpc.StatusCode[error.code].value[0], message=message)
    info = error_details_pb2.ErrorInfo(reason=error.code.value, domain=DOMAIN)
    room = MAX_DETAILS_BYTES
    for name, value in error.details.items():
        cut = _cut(value, MAX_DETAIL_BYTES)
        room -= len(name) + len(cut.encode())
        if room < 0:
            break
        info.metadata[name] = cut
    _pack(status, info)
    if isinstance(error, InvalidArgumentError) and "field" in error.details:
        bad = error_details_pb2.BadRequest()
        bad.field_violations.add(field=_cut(error.details["field"], MAX_DETAIL_BYTES), description=message)
        _pack(status, bad)
    return status


def error_from_rpc(error: grpc.RpcError) -> FuselineError:
    """The typed error behind a failed call of either API, with the details that the server gave.

    A status without our details (the peer is gone, a deadline passed, a foreign server) is told by its code alone.
    """
    code, message, metadata = _call_parts(error)
    status = _rich_status(code, metadata)
    details = {} if status is None else _error_info(status)
    known = _FOREIGN_CODES.get(code)
    if known is not None:
        details.setdefault("grpc_code", code.name)
    elif code.name in ErrorCode.__members__:
        known = ErrorCode[code.name]
    else:
        known = ErrorCode.INTERNAL
    return make_error(known, message or code.name, details)


def is_being_cancelled() -> bool:
    """Whether a cancellation that this task sees is its own, and not that of a call or future that it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


@asynccontextmanager
async def answering(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    """Around the body of an asyncio handler: a FuselineError ends the call with its status.

    So does a cancellation that is not this task's own, such as of something that it waits for: gRPC would leave the
    caller without an answer. Anything else but a cancellation is a bug: it is logged with its traceback, and the
    caller learns no more than INTERNAL.
    """
    try:
        yield
    except FuselineError as error:
        await _abort(context, error)
    except grpc.aio.AbortError:
        raise
    except asyncio.CancelledError:
        if is_being_cancelled():
            raise
        await _abort(context, UnavailableError("something that the request needs was cancelled"))
    except Exception:
        logger.exception("a handler failed")
        await _abort(context, InternalError("internal error; the server's log says more"))


@contextmanager
def answering_sync(context: grpc.ServicerContext) -> Iterator[None]:
    """The same for a handler that runs on a thread of a synchronous server."""
    try:
        yield
    except FuselineError as error:
        _abort_sync(context, error)


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: FuselineError) -> NoReturn:
    status = status_of(error)
    metadata = ((DETAILS_KEY, status.SerializeToString()),)
    await context.abort(grpc.StatusCode[error.code], status.message, metadata)


def _abort_sync(context: grpc.ServicerContext, error: FuselineError) -> NoReturn:
    status = status_of(error)
    context.set_trailing_metadata(((DETAILS_KEY, status.SerializeToString()),))
    context.abort(grpc.StatusCode[error.code], status.message)


def _call_parts(error: grpc.RpcError) -> tuple[grpc.StatusCode, str, list[tuple[str, str | bytes]]]:
    """Code, message and trailing metadata; AioRpcError has them itself, a synchronous error is its own call."""
    if not isinstance(error, grpc.aio.AioRpcError | grpc.Call):
        return grpc.StatusCode.UNKNOWN, str(error), []
    code = error.code() or grpc.StatusCode.UNKNOWN
    pairs: Any = error.trailing_metadata() or ()
    return code, error.details() or "", [(key, value) for key, value in pairs]


def _rich_status(code: grpc.StatusCode, metadata: list[tuple[str, str | bytes]]) -> status_pb2.Status | None:
    for key, value in metadata:
        if key == DETAILS_KEY and isinstance(value, bytes) and len(value) <= MAX_STATUS_BYTES:
            try:
                status = status_pb2.Status.FromString(value)
            except DecodeError:
                return None
            return status if status.code == code.value[0] else None
    return None


def _error_info(status: status_pb2.Status) -> dict[str, str]:
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Is(info.DESCRIPTOR):
            try:
                detail.Unpack(info)
            except DecodeError:
                return {}
            return dict(info.metadata) if info.domain == DOMAIN else {}
    return {}


def _pack(status: status_pb2.Status, detail: Any) -> None:
    packed = AnyMessage()
    packed.Pack(detail)
    status.details.append(packed)


def _cut(text: str, limit: int) -> str:
    """At most ``limit`` bytes of UTF-8, cut at a character; lone surrogates, which UTF-8 cannot carry, replaced."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= limit:
        return encoded.decode()
    return encoded[: limit - 3].decode("utf-8", "ignore") + "..."
