"""However a request ends, everything is freed promptly, on both sides, and the end is typed."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2

from fuseline.proto.fuseline.v1 import worker_pb2
from fuseline.runtime.errors import (
    AlreadyExistsError,
    DeadlineExceededError,
    ResourceExhaustedError,
    UnavailableError,
)
from fuseline.runtime.role import WorkerRole
from fuseline.tests.timing import PROMPTLY_S
from fuseline.tests.workers.kv_proxy import kv_proxy, through
from fuseline.tests.workers.worker_cases import (
    Worker,
    both_released,
    compute_locally,
    disaggregate,
    error_of,
    fresh_prompt,
    make_request,
    open_decode,
    open_prefill,
    worker,
)
from fuseline.workers import wire
from fuseline.workers.grpc_errors import error_from_rpc

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_cancel_before_the_reservation(decode: Worker) -> None:
    for _ in range(20):
        message = worker_pb2.DecodeRequest(sequence=wire.request_to_wire(make_request(fresh_prompt(100))))
        call = decode.decode.Decode(message)
        await asyncio.sleep(0)
        call.cancel()
    await decode.released()


async def test_cancel_while_waiting_for_kv(decode: Worker) -> None:
    decoding = await open_decode(decode, make_request(fresh_prompt(1500)))
    assert (await decode.engine.stats()).num_reserved == 1
    decoding.call.cancel()
    await decode.released()


async def test_cancel_in_the_middle_of_the_prompt(prefill: Worker, decode: Worker) -> None:
    request = make_request(fresh_prompt(1500))
    decoding = await open_decode(decode, request)
    async with kv_proxy(decode) as proxy:
        prefilling = open_prefill(prefill, request, through(proxy, decoding.reservation))
        await proxy.arrived.wait()  # some layers of some tokens are on their way
        decoding.call.cancel()
        prefilling.cancel()
        await both_released(prefill, decode)


async def test_cancel_while_the_transfer_hangs(prefill: Worker, decode: Worker) -> None:
    request = make_request(fresh_prompt(300))
    decoding = await open_decode(decode, request)
    async with kv_proxy(decode) as proxy:
        proxy.may_go_on.clear()
        prefilling = open_prefill(prefill, request, through(proxy, decoding.reservation))
        await anext(aiter(prefilling))  # the first token does not wait for the transfer
        await proxy.arrived.wait()
        prefilling.cancel()
        await prefill.released()
        proxy.may_go_on.set()
        # The prefill side has told decode.
        assert isinstance(await error_of(decoding.events), UnavailableError)
        await decode.released()


async def test_cancel_while_decoding(prefill: Worker, decode: Worker) -> None:
    request = make_request(fresh_prompt(50), max_tokens=1500)
    decoding = await open_decode(decode, request)
    async for _ in open_prefill(prefill, request, decoding.reservation):
        pass
    await anext(decoding.events)
    assert (await decode.engine.stats()).num_running == 1
    decoding.call.cancel()
    await both_released(prefill, decode)


async def test_cancel_of_a_local_prefill(decode: Worker) -> None:
    call = decode.decode.Decode(
        worker_pb2.DecodeRequest(sequence=wire.request_to_wire(make_request(fresh_prompt(1500))), local_prefill=True)
    )
    await decode.until(lambda stats: stats.num_running > 0)
    call.cancel()
    await decode.released()


async def test_decode_cancelled_alone_ends_the_prefill(prefill: Worker, decode: Worker) -> None:
    request = make_request(fresh_prompt(1500))
    decoding = await open_decode(decode, request)
    prefilling = open_prefill(prefill, request, decoding.reservation)
    decoding.call.cancel()
    assert isinstance(await error_of(prefilling), UnavailableError)
    await both_released(prefill, decode)


async def test_an_abort_storm_leaves_nothing(prefill: Worker, decode: Worker) -> None:
    """Requests are cancelled at random moments, on random legs, while others go on."""

    async def one(index: int) -> int:
        request = make_request(fresh_prompt(30 + 7 * index), max_tokens=12)
        if index % 3 == 0:
            return len((await disaggregate(prefill, decode, request)).token_ids)
        decoding = await open_decode(decode, request)
        prefilling = open_prefill(prefill, request, decoding.reservation)
        await asyncio.sleep(index * 0.004)
        (decoding.call if index % 3 == 1 else prefilling).cancel()
        (prefilling if index % 3 == 1 else decoding.call).cancel()
        return 12

    assert await asyncio.gather(*[one(index) for index in range(24)]) == [12] * 24
    await both_released(prefill, decode)


async def test_a_deadline_frees_a_reservation(decode: Worker) -> None:
    decoding = await open_decode(decode, make_request(fresh_prompt(1500)), timeout=4)
    told = await decode.engine.call(lambda engine: engine.next_deadline)
    assert told is not None
    # The engine knows the caller's deadline (gRPC may round it up), not only its own limit of half a minute or more.
    assert told - time.monotonic() < 7
    assert isinstance(await error_of(decoding.events), DeadlineExceededError)
    await decode.released()


async def test_a_deadline_ends_prefill_and_decode(prefill: Worker, decode: Worker) -> None:
    error = await error_of(open_prefill(prefill, make_request(fresh_prompt(1500)), None, timeout=0.01))
    assert isinstance(error, DeadlineExceededError)
    with pytest.raises(grpc.RpcError) as caught:
        await compute_locally(decode, make_request(fresh_prompt(50), max_tokens=1900), timeout=0.2)
    assert isinstance(error_from_rpc(caught.value), DeadlineExceededError)
    await both_released(prefill, decode)


async def test_a_reservation_without_room_is_refused(decode: Worker) -> None:
    held = [await open_decode(decode, make_request(fresh_prompt(1000))) for _ in range(4)]
    with pytest.raises(grpc.RpcError) as caught:
        await open_decode(decode, make_request(fresh_prompt(1000)))
    assert isinstance(error_from_rpc(caught.value), ResourceExhaustedError)
    for decoding in held:
        decoding.call.cancel()
    await decode.released()


async def test_one_name_is_one_request(decode: Worker) -> None:
    request = make_request(fresh_prompt(50))
    decoding = await open_decode(decode, request)
    with pytest.raises(grpc.RpcError) as caught:
        await open_decode(decode, request)
    assert isinstance(error_from_rpc(caught.value), AlreadyExistsError)
    decoding.call.cancel()
    await decode.released()


async def test_a_handoff_that_never_comes_expires() -> None:
    async with worker(WorkerRole.DECODE, handoff_timeout_s=1) as decode:
        decoding = await open_decode(decode, make_request(fresh_prompt(50)))
        error = await error_of(decoding.events)
        assert isinstance(error, UnavailableError)  # another try may do better; the caller's deadline has not passed
        await decode.released()


async def test_a_rank_lost_while_idle_ends_requests_and_health() -> None:
    async with worker(WorkerRole.DECODE, 2) as wounded:
        waiting = await open_decode(wounded, make_request(fresh_prompt(50)))
        watch = wounded.worker.Watch(worker_pb2.WatchRequest())
        os.kill(wounded.server.pids[1], signal.SIGKILL)
        async with asyncio.timeout(PROMPTLY_S):
            assert isinstance(await wounded.server.failed(), UnavailableError)
        for events in (waiting.events, watch):
            assert isinstance(await error_of(events), UnavailableError)
        assert await wounded.health("") == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.RpcError) as caught:
            await compute_locally(wounded, make_request([1]))
        assert isinstance(error_from_rpc(caught.value), UnavailableError)
