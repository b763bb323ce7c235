"""KV that is not what it claims to be is refused, counted, and never becomes text."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import grpc
import grpc.aio
import pytest

from fuseline.proto.fuseline.v1 import common_pb2, kv_transfer_pb2
from fuseline.runtime.errors import (
    InvalidArgumentError,
    NotFoundError,
    ProvenanceError,
    UnavailableError,
)
from fuseline.runtime.handoff import Provenance, token_prefix_hash
from fuseline.runtime.request import Request
from fuseline.runtime.role import WorkerRole
from fuseline.tests.workers.kv_proxy import kv_proxy, through
from fuseline.tests.workers.worker_cases import (
    Decoding,
    Worker,
    both_released,
    compute_locally,
    error_of,
    fresh_prompt,
    make_request,
    open_decode,
    open_prefill,
    worker,
)
from fuseline.workers.grpc_errors import error_from_rpc

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def failures(*workers: Worker) -> list[int]:
    return [(await found.snapshot()).num_provenance_failures for found in workers]


async def test_prefill_refuses_another_prompt_than_was_reserved_for(prefill: Worker, decode: Worker) -> None:
    before = await failures(prefill)
    request = make_request(fresh_prompt(50))
    decoding = await open_decode(decode, request)
    wrong = Request(request.request_id, tuple(fresh_prompt(50)), request.params)
    num_steps = (await prefill.engine.stats()).num_steps
    assert isinstance(await error_of(open_prefill(prefill, wrong, decoding.reservation)), ProvenanceError)
    assert isinstance(await error_of(decoding.events), UnavailableError)
    assert (await prefill.engine.stats()).num_steps == num_steps  # before anything is computed
    assert await failures(prefill) == [before[0] + 1]
    await both_released(prefill, decode)


@pytest.mark.parametrize("lie", ["prompt", "epoch", "fingerprint"])
async def test_decode_refuses_kv_of_something_else(prefill: Worker, decode: Worker, lie: str) -> None:
    """A prefill worker that was lied to about the reservation pushes KV of another prompt, attempt or model."""
    request = make_request(fresh_prompt(50))
    decoding = await open_decode(decode, request)
    reservation, told = decoding.reservation, request
    if lie == "prompt":
        told = Request(request.request_id, tuple(fresh_prompt(50)), request.params)
        reservation.provenance.prefix_hash = token_prefix_hash(told.prompt_token_ids)
    elif lie == "epoch":
        told = Request(request.request_id, request.prompt_token_ids, request.params, epoch=1)
        reservation.provenance.epoch = 1
    else:
        reservation.provenance.model_fingerprint = "f" * 64
    before = await failures(prefill)
    error = await error_of(open_prefill(prefill, told, reservation))
    assert isinstance(error, ProvenanceError), error
    assert await failures(prefill) == [before[0] + 1]
    assert isinstance(await error_of(decoding.events), UnavailableError)
    await both_released(prefill, decode)


async def test_kv_in_another_dtype_is_refused(decode: Worker) -> None:
    """By the prefill worker before it computes anything, or, where that was lied to, by decode as it arrives."""
    async with worker(WorkerRole.PREFILL, kv_cache_dtype="int8") as other:
        for is_lied_to in (False, True):
            request = make_request(fresh_prompt(50))
            decoding = await open_decode(decode, request)
            if is_lied_to:
                decoding.reservation.provenance.dtype = "int8"
            before = await failures(other)
            error = await error_of(open_prefill(other, request, decoding.reservation))
            assert isinstance(error, ProvenanceError), error
            assert await failures(other) == [before[0] + 1]
            assert ((await other.engine.stats()).num_steps > 0) is is_lied_to
            assert isinstance(await error_of(decoding.events), UnavailableError)
        await both_released(other, decode)


@pytest.mark.parametrize("tampering", ["corrupt", "swallow"])
async def test_bytes_that_are_not_what_was_computed_never_become_text(
    prefill: Worker, decode: Worker, tampering: str
) -> None:
    request = make_request(fresh_prompt(50))
    decoding = await open_decode(decode, request)
    before = await failures(prefill, decode)
    async with kv_proxy(decode) as proxy:
        proxy.on_push = (lambda m: m[:-1] + bytes([m[-1] ^ 1])) if tampering == "corrupt" else (lambda m: None)
        error = await error_of(open_prefill(prefill, request, through(proxy, decoding.reservation)))
    assert isinstance(error, ProvenanceError), error
    assert isinstance(await error_of(decoding.events), UnavailableError)
    after = await failures(prefill, decode)
    # What is missing is found by the commit, at decode; what is corrupt, after some retries, by the sender.
    assert after == [before[0] + 1, before[1] + (tampering == "swallow")]
    await both_released(prefill, decode)


@pytest.mark.parametrize("change", ["epoch", "prompt", "request", "two tokens", "no token", "short hash"])
async def test_a_commit_that_does_not_fit_is_refused(prefill: Worker, decode: Worker, change: str) -> None:
    def spoil(message: kv_transfer_pb2.CommitRequest) -> kv_transfer_pb2.CommitRequest:
        match change:
            case "epoch":
                message.provenance.epoch = 7
            case "prompt":
                message.provenance.prefix_hash = b"x" * 32
            case "request":
                message.provenance.request_id = "another"
            case "two tokens":
                message.first_token.token_ids.append(1)
            case "no token":
                del message.first_token.token_ids[:]
            case "short hash":
                message.provenance.prefix_hash = b"x"
        return message

    request = make_request(fresh_prompt(50))
    decoding = await open_decode(decode, request)
    before = await failures(decode)
    async with kv_proxy(decode) as proxy:
        proxy.on_commit = spoil
        error = await error_of(open_prefill(prefill, request, through(proxy, decoding.reservation)))
    is_provenance = change in ("epoch", "prompt", "request")
    assert isinstance(error, ProvenanceError if is_provenance else InvalidArgumentError), error
    assert await failures(decode) == [before[0] + is_provenance]
    assert isinstance(await error_of(decoding.events), UnavailableError)
    await both_released(prefill, decode)


async def test_a_commit_for_nobody_is_not_found(decode: Worker) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        await decode.transfer.Commit(kv_transfer_pb2.CommitRequest(reservation_id="guessed"))
    assert isinstance(error_from_rpc(caught.value), NotFoundError)
    await decode.transfer.Abort(kv_transfer_pb2.AbortRequest(reservation_id="guessed"))


async def test_kv_that_comes_late_is_not_for_the_next_attempt(prefill: Worker, decode: Worker) -> None:
    """The same request is reserved again, with another epoch, while the first attempt's KV is on its way."""
    request = make_request(fresh_prompt(50))
    decoding = await open_decode(decode, request)
    async with kv_proxy(decode) as proxy:
        proxy.may_go_on.clear()
        prefilling = open_prefill(prefill, request, through(proxy, decoding.reservation))
        await proxy.arrived.wait()
        decoding.call.cancel()
        again = replace(request, epoch=1)
        retry = await open_decode(decode, again)
        proxy.may_go_on.set()
        assert isinstance(await error_of(prefilling), UnavailableError)
    assert (await decode.engine.stats()).num_reserved == 1
    assert await tokens_of_retry(prefill, again, retry) == await tokens_alone(decode, request)
    await both_released(prefill, decode)


async def test_a_commit_that_is_overtaken_does_not_start_the_next_attempt(
    prefill: Worker, decode: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first attempt's KV is being verified, its stream ends and the request is reserved again."""
    verified, may_go_on = asyncio.Event(), asyncio.Event()
    verify = decode.server._ranks.verify_reservation

    async def slowly(reservation_id: str, provenance: Provenance) -> None:
        await verify(reservation_id, provenance)
        verified.set()
        await may_go_on.wait()

    monkeypatch.setattr(decode.server._ranks, "verify_reservation", slowly)
    request = make_request(fresh_prompt(50))
    decoding = await open_decode(decode, request)
    prefilling = open_prefill(prefill, request, decoding.reservation)
    await verified.wait()
    decoding.call.cancel()
    again = replace(request, epoch=1)
    retry = await open_decode(decode, again)
    may_go_on.set()
    assert isinstance(await error_of(prefilling), NotFoundError)
    stats = await decode.engine.stats()
    assert (stats.num_reserved, stats.num_running) == (1, 0)
    assert await tokens_of_retry(prefill, again, retry) == await tokens_alone(decode, request)
    await both_released(prefill, decode)


async def test_a_commit_that_is_cut_off_ends_the_request(
    prefill: Worker, decode: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its prefill worker is lost while the KV is being verified; nobody else would tell the waiting stream."""
    verifying = asyncio.Event()

    async def for_ever(*_: object) -> None:
        verifying.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(decode.server._ranks, "verify_reservation", for_ever)
    decoding = await open_decode(decode, make_request(fresh_prompt(50)))
    commit = decode.transfer.Commit(
        kv_transfer_pb2.CommitRequest(
            reservation_id=decoding.reservation.reservation_id,
            provenance=decoding.reservation.provenance,
            first_token=common_pb2.SequenceOutput(token_ids=[1]),
        )
    )
    await verifying.wait()
    commit.cancel()
    error = await error_of(decoding.events)
    assert isinstance(error, UnavailableError)
    assert "cut off" in error.message
    await both_released(prefill, decode)


async def tokens_of_retry(prefill: Worker, request: Request, decoding: Decoding) -> list[int]:
    tokens: list[int] = []
    async for event in open_prefill(prefill, request, decoding.reservation):
        tokens += event.first_token.token_ids
    async for decoded in decoding.events:
        tokens += decoded.output.token_ids
    return tokens


async def tokens_alone(decode: Worker, request: Request) -> list[int]:
    return (await compute_locally(decode, replace(request, request_id="alone"))).token_ids
