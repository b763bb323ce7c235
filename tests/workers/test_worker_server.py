"""What a worker refuses, and what it tells of itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2

from fuseline.proto.fuseline.v1 import common_pb2, worker_pb2
from fuseline.runtime.errors import (
    ErrorCode,
    InvalidArgumentError,
    UnavailableError,
)
from fuseline.runtime.role import WorkerRole
from fuseline.tests.timing import PATIENTLY_S
from fuseline.tests.workers.worker_cases import (
    Worker,
    compute_locally,
    fresh_prompt,
    make_request,
    open_decode,
    worker,
)
from fuseline.workers.grpc_errors import DETAILS_KEY, error_from_rpc
from fuseline.workers.server import WorkerServer
from fuseline.workers.services import status

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def decode() -> AsyncIterator[Worker]:
    async with worker(WorkerRole.DECODE, handoff_timeout_s=20) as started:
        yield started


def sampling(**values: Any) -> dict[str, Any]:
    return {"sampling_params": common_pb2.SamplingParams(**values)}


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("empty prompt", {"prompt_token_ids": []}, "prompt"),
    ("no name", {"request_id": ""}, "request_id"),
    ("token beyond the vocabulary", {"prompt_token_ids": [5000]}, "prompt"),
    ("token beyond int32", {"prompt_token_ids": [2**32 - 1]}, "prompt_token_ids"),
    ("prompt too long", {"prompt_token_ids": [1] * 3000}, "prompt"),
    (
        "temperature not a number",
        {"sampling_params": common_pb2.SamplingParams(temperature=float("nan"))},
        "temperature",
    ),
    (
        "bias beyond the vocabulary",
        {"sampling_params": common_pb2.SamplingParams(logit_bias={9999: 1})},
        "logit_bias",
    ),
    ("too many logprobs", {"sampling_params": common_pb2.SamplingParams(logprobs=1000)}, "logprobs"),
    ("seed too large", {"seed": 2**63}, "seed"),
]


@pytest.mark.parametrize(("fields", "field"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
@pytest.mark.parametrize("way", ["prefill", "local", "reserve"])
async def test_bad_input_is_refused_by_field_and_nothing_is_held(
    decode: Worker, way: str, fields: dict[str, Any], field: str
) -> None:
    sequence = common_pb2.SequenceRequest(**{"request_id": "bad", "prompt_token_ids": [1, 2], **fields})
    if way == "prefill":
        call = decode.prefill.Prefill(worker_pb2.PrefillRequest(sequence=sequence))
    else:
        call = decode.decode.Decode(worker_pb2.DecodeRequest(sequence=sequence, local_prefill=way == "local"))
    with pytest.raises(grpc.RpcError) as caught:
        await anext(aiter(call))
    assert isinstance(error_from_rpc(caught.value), InvalidArgumentError)
    bad = error_details_pb2.BadRequest()
    metadata: Any = caught.value.trailing_metadata()
    assert status_pb2.Status.FromString(dict(metadata)[DETAILS_KEY]).details[1].Unpack(bad)
    assert [violation.field for violation in bad.field_violations] == [field]
    await decode.released()


async def test_an_oversized_message_is_refused(decode: Worker) -> None:
    """By gRPC itself, before anything is parsed."""
    channel: Any = decode.channel
    call = channel.unary_stream("/fuseline.v1.DecodeService/Decode")(b"x" * (17 << 20))
    with pytest.raises(grpc.RpcError) as caught:
        await anext(aiter(call))
    assert error_from_rpc(caught.value).code is ErrorCode.RESOURCE_EXHAUSTED
    await decode.released()


async def test_a_watch_tells_changes_at_once_and_otherwise_now_and_then(
    decode: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = decode.worker.Watch(worker_pb2.WatchRequest(min_interval_ms=10))
    snapshots = aiter(call)
    first = await anext(snapshots)
    assert (first.role, first.max_num_seqs) == (worker_pb2.WORKER_ROLE_DECODE, 16)
    assert first.num_free_blocks == first.num_total_blocks == 256
    monkeypatch.setattr(status, "MAX_INTERVAL_S", 2 * PATIENTLY_S)  # once the one that is being waited for is told
    async with asyncio.timeout(PATIENTLY_S):
        assert (await anext(snapshots)).num_free_blocks == 256  # nothing has changed
        decoding = await open_decode(decode, make_request(fresh_prompt(100)))
        changed = await anext(snapshots)
        assert changed.num_free_blocks < 256
        decoding.call.cancel()
        while (await anext(snapshots)).num_free_blocks < 256:
            pass
    call.cancel()


async def test_health_is_told_for_roles_and_services(decode: Worker) -> None:
    for name in ("", "decode", "fuseline.v1.DecodeService", "fuseline.v1.KvTransfer", "fuseline.v1.Worker"):
        assert await decode.health(name) == health_pb2.HealthCheckResponse.SERVING
    await decode.server.set_role(WorkerRole.MIXED)
    assert await decode.health("decode") == health_pb2.HealthCheckResponse.NOT_SERVING
    assert (await decode.snapshot()).role == worker_pb2.WORKER_ROLE_MIXED
    await decode.server.set_role(WorkerRole.DECODE)
    assert await decode.health("decode") == health_pb2.HealthCheckResponse.SERVING


async def test_a_port_in_use_is_told(decode: Worker) -> None:
    port = int(decode.address.rpartition(":")[2])
    with pytest.raises(UnavailableError, match=str(port)):
        WorkerServer("second", WorkerRole.DECODE, decode.group, port=port)


async def test_draining_lets_requests_finish_and_admits_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    async with worker(WorkerRole.DECODE) as draining:
        waiting = await open_decode(draining, make_request(fresh_prompt(50)))  # for KV that does not come
        running = asyncio.create_task(compute_locally(draining, make_request(fresh_prompt(50), max_tokens=300)))
        await draining.until(lambda stats: stats.num_running > 0)
        with monkeypatch.context() as patch:
            patch.setattr(status, "ANSWER_MARGIN_S", PATIENTLY_S)  # so that it answers before anything is done
            slow = await draining.worker.Drain(worker_pb2.DrainWorkerRequest(), timeout=PATIENTLY_S)
        assert 1 <= slow.num_left <= 2
        drain = asyncio.ensure_future(draining.worker.Drain(worker_pb2.DrainWorkerRequest(), timeout=30))
        with pytest.raises(grpc.RpcError) as caught:
            await compute_locally(draining, make_request([1]))
        assert isinstance(error_from_rpc(caught.value), UnavailableError)
        assert (await draining.snapshot()).draining
        assert await draining.health("") == health_pb2.HealthCheckResponse.NOT_SERVING
        assert len((await running).token_ids) == 300
        assert not drain.done()
        waiting.call.cancel()
        assert (await drain).num_left == 0
