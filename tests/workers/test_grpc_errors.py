"""Errors cross a real gRPC connection, asyncio and synchronous, with class, message and details intact."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2

from fuseline.proto.fuseline.v1 import worker_pb2, worker_pb2_grpc
from fuseline.runtime import errors
from fuseline.runtime.errors import ErrorCode, FuselineError, make_error
from fuseline.workers import grpc_errors
from fuseline.workers.grpc_errors import DETAILS_KEY, answering, answering_sync, error_from_rpc

CLASSES = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, FuselineError)][
    1:
]  # without the base, which shares INTERNAL


class AsyncWorker(worker_pb2_grpc.WorkerServicer):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    async def Drain(self, request: object, context: Any) -> worker_pb2.DrainWorkerResponse:
        async with answering(context):
            raise self.error
        return worker_pb2.DrainWorkerResponse()


class SyncWorker(worker_pb2_grpc.WorkerServicer):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def Drain(self, request: object, context: grpc.ServicerContext) -> worker_pb2.DrainWorkerResponse:
        with answering_sync(context):
            raise self.error
        return worker_pb2.DrainWorkerResponse()


@asynccontextmanager
async def async_stub(error: BaseException) -> AsyncIterator[worker_pb2_grpc.WorkerStub]:
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServicer_to_server(AsyncWorker(error), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield worker_pb2_grpc.WorkerStub(channel)
    await server.stop(None)


@contextmanager
def sync_stub(error: BaseException) -> Iterator[worker_pb2_grpc.WorkerStub]:
    server = grpc.server(ThreadPoolExecutor(1))
    worker_pb2_grpc.add_WorkerServicer_to_server(SyncWorker(error), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield worker_pb2_grpc.WorkerStub(channel)
    server.stop(None).wait()


async def over_asyncio(error: BaseException) -> grpc.RpcError:
    async with async_stub(error) as stub:
        with pytest.raises(grpc.RpcError) as caught:
            await stub.Drain(worker_pb2.DrainWorkerRequest())
    return caught.value


def test_every_code_has_one_class() -> None:
    assert {cls.code for cls in CLASSES} == set(ErrorCode)
    for cls in CLASSES:
        assert type(make_error(cls.code, "m")) is cls


@pytest.mark.parametrize("cls", CLASSES)
async def test_errors_cross_the_asyncio_api(cls: type[FuselineError]) -> None:
    received = error_from_rpc(await over_asyncio(cls("too big: é", field="n", value=9, limit="1..8")))
    assert type(received) is cls
    assert received.message == "too big: é"
    assert received.details == {"field": "n", "value": "9", "limit": "1..8"}


@pytest.mark.parametrize("cls", CLASSES[:3])
def test_errors_cross_the_synchronous_api(cls: type[FuselineError]) -> None:
    with sync_stub(cls("gone", worker="w1")) as stub, pytest.raises(grpc.RpcError) as caught:
        stub.Drain(worker_pb2.DrainWorkerRequest())
    received = error_from_rpc(caught.value)
    assert type(received) is cls
    assert received.details == {"worker": "w1"}


async def test_a_bad_field_is_named_as_google_rpc_does() -> None:
    metadata: Any = (await over_asyncio(errors.InvalidArgumentError("n must be 1", field="n"))).trailing_metadata()
    status = status_pb2.Status.FromString(dict(metadata)[DETAILS_KEY])
    bad = error_details_pb2.BadRequest()
    assert status.details[1].Unpack(bad)
    assert [(violation.field, violation.description) for violation in bad.field_violations] == [("n", "n must be 1")]


@pytest.mark.parametrize("text", ["x" * 100_000, "\u6f22" * 50_000, "\U0001f600" * 50_000, "\n\0%" * 9999, "\udc80"])
async def test_long_or_odd_text_is_cut_but_the_code_arrives(text: str) -> None:
    details = {f"key{i}": text for i in range(50)}
    received = error_from_rpc(await over_asyncio(errors.InvalidArgumentError(text, field=text, **details)))
    assert received.code is ErrorCode.INVALID_ARGUMENT
    assert received.details["field"][:1] == text[:1].encode("utf-8", "replace").decode()


async def test_a_bug_is_internal_and_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    received = error_from_rpc(await over_asyncio(RuntimeError("/secret/path")))
    assert type(received) is errors.InternalError
    assert "secret" not in received.message
    assert "/secret/path" in caplog.text  # the log has it, with its traceback


async def test_a_cancellation_that_is_not_the_handlers_own_is_answered() -> None:
    async with asyncio.timeout(10):  # gRPC itself would never end the call
        received = error_from_rpc(await over_asyncio(asyncio.CancelledError()))
    assert type(received) is errors.UnavailableError


async def test_a_peer_that_is_gone_is_unavailable() -> None:
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        with pytest.raises(grpc.RpcError) as caught:
            await worker_pb2_grpc.WorkerStub(channel).Drain(worker_pb2.DrainWorkerRequest())
    assert type(error_from_rpc(caught.value)) is errors.UnavailableError


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.UNKNOWN, ErrorCode.INTERNAL),
        (grpc.StatusCode.UNIMPLEMENTED, ErrorCode.FAILED_PRECONDITION),
        (grpc.StatusCode.ABORTED, ErrorCode.UNAVAILABLE),
        (grpc.StatusCode.DEADLINE_EXCEEDED, ErrorCode.DEADLINE_EXCEEDED),
    ],
)
@pytest.mark.parametrize(
    "blob", [b"", b"\xff\xff garbage", b"x" * 10_000, status_pb2.Status(code=3).SerializeToString()]
)
def test_foreign_statuses_and_bad_details_are_told_by_code(
    code: grpc.StatusCode, expected: ErrorCode, blob: bytes
) -> None:
    metadata = grpc.aio.Metadata((DETAILS_KEY, blob))
    error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), metadata, "why", None)
    received = error_from_rpc(error)
    assert received.code is expected
    assert received.message == "why"


def test_details_of_a_peer_cannot_shadow_arguments() -> None:
    info = error_details_pb2.ErrorInfo(domain=grpc_errors.DOMAIN, metadata={"message": "x", "self": "y", "code": "z"})
    status = status_pb2.Status(code=grpc.StatusCode.INTERNAL.value[0])
    status.details.add().Pack(info)
    metadata = grpc.aio.Metadata((DETAILS_KEY, status.SerializeToString()))
    error = grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), metadata, "why", None)
    assert error_from_rpc(error).message == "why"
