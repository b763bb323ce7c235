"""A sequence's way over prefill and decode workers, and over others when they fail: every turn it can take."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from fuseline.cluster.dispatcher import Dispatcher
from fuseline.cluster.membership import StaticMembership
from fuseline.cluster.request_flow import MAX_ATTEMPTS, FlowRecord, SequenceFlow
from fuseline.cluster.router import Router
from fuseline.cluster.worker_pool import WorkerPool
from fuseline.proto.fuseline.v1 import common_pb2, worker_pb2
from fuseline.runtime.errors import DeadlineExceededError, FuselineError, InternalError, UnavailableError
from fuseline.runtime.request import Request
from fuseline.runtime.role import WorkerRole
from fuseline.runtime.sampling_params import SamplingParams
from fuseline.tests.cluster.scripted_worker import ScriptedWorker, first_token, following, output, reserved, until

UNAVAILABLE, CANCELLED = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED
NOT_FOUND, ALREADY_EXISTS = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ALREADY_EXISTS
NEVER = asyncio.Event


@dataclass
class Cluster:
    pool: WorkerPool
    membership: StaticMembership
    record: FlowRecord = field(default_factory=FlowRecord)

    def __post_init__(self) -> None:
        self.dispatcher = Dispatcher(self.pool, Router(16))

    def flow(self, num_tokens: int = 20, **fields: Any) -> SequenceFlow:
        request = Request("r", tuple(range(num_tokens)), SamplingParams(max_tokens=3), **fields)
        return SequenceFlow(request, (), self.dispatcher, self.record, time.monotonic)

    async def run(self, **fields: Any) -> list[int]:
        async with aclosing(self.flow(**fields).outputs()) as outputs:
            return [token async for output in outputs for token in output.token_ids]


@asynccontextmanager
async def cluster(*workers: ScriptedWorker) -> AsyncIterator[Cluster]:
    async with following(*workers) as (pool, membership):
        yield Cluster(pool, membership)


def prefill(worker_id: str, *script: list[Any], **snapshot: Any) -> ScriptedWorker:
    return ScriptedWorker(worker_id, WorkerRole.PREFILL, *script, **snapshot)


def decode(worker_id: str, *script: list[Any], **snapshot: Any) -> ScriptedWorker:
    return ScriptedWorker(worker_id, WorkerRole.DECODE, *script, **snapshot)


def load(cluster: Cluster) -> dict[str, tuple[int, int, int]]:
    """Pending work as the router sees it."""
    return {r.worker_id: (r.num_seqs, r.num_queued_tokens, r.num_free_blocks) for r in cluster.pool.replicas()}


async def test_a_sequence_goes_from_reservation_over_prefill_to_decode() -> None:
    p, d = prefill("p", [first_token(7)]), decode("d", [reserved(), output(8), output(9, last=True)])
    async with cluster(p, d) as c:
        assert await c.run() == [7, 8, 9]
        assert p.requests[0].reservation.reservation_id == "r"
        assert list(d.requests[0].sequence.prompt_token_ids) == list(range(20))
        assert (c.record.prefill_worker, c.record.decode_worker, c.record.num_retries) == ("p", "d", 0)
        assert load(c) == {"p": (0, 0, 100), "d": (0, 0, 100)}


async def test_the_first_token_is_given_out_before_decode_says_anything() -> None:
    committed = asyncio.Event()
    p = prefill("p", [first_token(7), committed])
    d = decode("d", [reserved(), committed, output(8, last=True)])
    async with cluster(p, d) as c, aclosing(c.flow().outputs()) as outputs:
        assert list((await anext(outputs)).token_ids) == [7]
        committed.set()
        assert list((await anext(outputs)).token_ids) == [8]


async def test_a_first_token_that_ends_the_sequence_ends_the_reservation() -> None:
    p, d = prefill("p", [first_token(7, 0)]), decode("d", [reserved(), NEVER()])
    async with cluster(p, d) as c:
        assert await c.run() == [7]
        await until(lambda: d.ended == ["cancelled"])


@pytest.mark.parametrize("steps", [[UNAVAILABLE], [first_token(7), UNAVAILABLE], []])
async def test_a_failed_prefill_is_done_again_elsewhere_under_a_new_epoch(steps: list[Any]) -> None:
    first = prefill("p0", steps)
    second = prefill("p1", [first_token(7)], num_queued_tokens=100)
    d = decode("d", [reserved(), NEVER()], [reserved(), output(8, last=True)])
    async with cluster(first, second, d) as c:
        assert await c.run() == [7, 8]
        assert c.record.num_retries == 1
        assert c.record.prefill_worker == "p1"
        assert [r.sequence.epoch for r in d.requests] == [0, 1]
        assert second.requests[0].sequence.epoch == 1
        assert d.ended[0] == "cancelled"


@pytest.mark.parametrize("steps", [[UNAVAILABLE], [reserved(), UNAVAILABLE], [reserved()]])
async def test_a_failed_decode_worker_is_replaced(steps: list[Any]) -> None:
    p = prefill("p", [first_token(7), NEVER()], [first_token(7)])
    first = decode("d0", steps)
    second = decode("d1", [reserved(), output(8, last=True)], num_running=2)
    async with cluster(p, first, second) as c:
        assert await c.run() == [7, 8]
        assert (c.record.decode_worker, c.record.num_retries) == ("d1", 1)


async def test_a_retry_that_samples_another_first_token_is_a_bug_that_is_told() -> None:
    p = prefill("p", [first_token(7), NEVER()], [first_token(70)])
    d = decode("d", [reserved(), UNAVAILABLE], [reserved(), NEVER()])
    d.script[0].insert(1, given := asyncio.Event())
    async with cluster(p, d) as c, aclosing(c.flow().outputs()) as outputs:
        await anext(outputs)
        given.set()
        with pytest.raises(InternalError, match="first token was"):
            await anext(outputs)


@pytest.mark.parametrize("steps", [[UNAVAILABLE], [first_token(7), UNAVAILABLE]])
@pytest.mark.parametrize("outputs", [[output(7), output(8, last=True)], [output(7, 8, last=True)]])
async def test_without_another_prefill_worker_decode_computes_the_prompt_and_no_token_comes_twice(
    steps: list[Any], outputs: list[Any]
) -> None:
    p, d = prefill("p", steps), decode("d", [reserved(), NEVER()], outputs)
    async with cluster(p, d) as c:
        assert await c.run() == [7, 8]
        assert [request.local_prefill for request in d.requests] == [False, True]
        assert (c.record.prefill_worker, c.record.num_retries) == ("", 1)


async def test_what_was_given_out_with_the_first_token_does_not_come_again() -> None:
    def told(*tokens: int, finish_reason: common_pb2.FinishReason) -> common_pb2.SequenceOutput:
        logprobs = [common_pb2.TokenLogprobs(token_id=token) for token in tokens]
        prompt = [common_pb2.TokenLogprobs(token_id=1)]
        return common_pb2.SequenceOutput(
            token_ids=tokens, logprobs=logprobs, prompt_logprobs=prompt, finish_reason=finish_reason
        )

    first = worker_pb2.PrefillEvent(first_token=told(7, finish_reason=common_pb2.FINISH_REASON_UNSPECIFIED))
    whole = worker_pb2.DecodeEvent(output=told(7, 8, finish_reason=common_pb2.FINISH_REASON_LENGTH))
    p, d = prefill("p", [first, UNAVAILABLE]), decode("d", [reserved(), NEVER()], [whole])
    async with cluster(p, d) as c, aclosing(c.flow().outputs()) as outputs:
        seen = [output async for output in outputs]
        assert [[entry.token_id for entry in output.logprobs] for output in seen] == [[7], [8]]
        assert [len(output.prompt_logprobs) for output in seen] == [1, 0]


async def test_a_decode_worker_that_computes_another_first_token_ends_the_sequence() -> None:
    p, d = prefill("p", [first_token(7), UNAVAILABLE]), decode("d", [reserved(), NEVER()], [output(70), NEVER()])
    async with cluster(p, d) as c:
        with pytest.raises(UnavailableError, match="first token was"):
            await c.run()


async def test_a_try_that_has_only_repeated_what_was_given_out_is_followed_by_another() -> None:
    p = prefill("p", [first_token(7), UNAVAILABLE])
    first = decode("d0", [reserved(), NEVER()], [output(7), UNAVAILABLE])
    second = decode("d1", [output(7), output(8, last=True)], num_running=2)
    async with cluster(p, first, second) as c:
        assert await c.run() == [7, 8]
        assert (c.record.decode_worker, c.record.num_retries) == ("d1", 2)


async def test_nothing_is_retried_once_decode_has_given_something() -> None:
    p = prefill("p", [first_token(7)])
    d = decode("d", [reserved(), output(8), UNAVAILABLE])
    async with cluster(p, d) as c:
        with pytest.raises(UnavailableError):
            await c.run()
        assert len(d.requests) == 1


@pytest.mark.parametrize("status", [UNAVAILABLE, CANCELLED, NOT_FOUND, ALREADY_EXISTS])
async def test_attempts_are_bounded_and_the_last_error_is_told(status: grpc.StatusCode) -> None:
    p = prefill("p")
    d = decode("d", *[[status]] * MAX_ATTEMPTS)
    async with cluster(p, d) as c:
        with pytest.raises(UnavailableError, match="as the test says"):
            await c.run()
        assert len(d.requests) == MAX_ATTEMPTS
        assert load(c) == {"p": (0, 0, 100), "d": (0, 0, 100)}


@pytest.mark.parametrize("status", [NOT_FOUND, ALREADY_EXISTS])
async def test_names_that_the_gateway_gave_are_not_the_users_fault(status: grpc.StatusCode) -> None:
    """A commit comes late by a hair, or an attempt before its predecessor is cleaned up."""
    p = prefill("p", [first_token(7), status])
    d = decode("d", [reserved(), NEVER()], [status], [output(7), output(8, last=True)])
    async with cluster(p, d) as c:
        assert await c.run() == [7, 8]
        assert c.record.num_retries == 2


async def test_a_connection_that_is_closed_under_a_sequence_is_an_error_and_no_silent_end() -> None:
    p, d = prefill("p", [first_token(7)]), decode("d", [reserved(), output(8), NEVER()])
    async with cluster(p, d) as c, aclosing(c.flow().outputs()) as outputs:
        assert [list((await anext(outputs)).token_ids) for _ in range(2)] == [[7], [8]]
        waiting = asyncio.ensure_future(anext(outputs))
        await asyncio.sleep(0)
        await c.pool.close()
        with pytest.raises(UnavailableError, match="the connection to worker d was closed"):
            await waiting


async def test_an_error_that_another_worker_would_repeat_is_not_retried() -> None:
    p, d = prefill("p"), decode("d", [grpc.StatusCode.INVALID_ARGUMENT])
    async with cluster(p, d) as c:
        with pytest.raises(FuselineError) as info:
            await c.run()
        assert info.value.code == "INVALID_ARGUMENT"


async def test_a_handoff_that_expires_at_a_worker_is_not_the_users_deadline() -> None:
    expired = grpc.StatusCode.DEADLINE_EXCEEDED
    p = prefill("p", [NEVER()], [first_token(7)])
    d = decode("d", [reserved(), p.called, expired], [reserved(), output(8, last=True)])
    async with cluster(p, d) as c:
        assert await c.run(deadline=time.monotonic() + 30) == [7, 8]
        assert c.record.num_retries == 1


async def test_a_refused_reservation_waits_for_the_workers_next_snapshot() -> None:
    p = prefill("p", [first_token(7)])
    d = decode("d", [grpc.StatusCode.RESOURCE_EXHAUSTED], [reserved(), output(8, last=True)])
    async with cluster(p, d) as c:
        running = asyncio.create_task(c.run())
        await until(lambda: c.dispatcher.num_waiting == 1 and len(d.requests) == 1)
        d.publish(num_free_blocks=50)
        assert await running == [7, 8]
        assert c.record.num_retries == 0


async def test_closing_the_flow_ends_both_legs() -> None:
    p, d = prefill("p", [first_token(7), NEVER()]), decode("d", [reserved(), NEVER()])
    async with cluster(p, d) as c:
        async with aclosing(c.flow().outputs()) as outputs:
            await anext(outputs)
        await until(lambda: p.ended == d.ended == ["cancelled"])
        assert load(c) == {"p": (0, 0, 100), "d": (0, 0, 100)}


async def test_a_deadline_ends_the_wait_for_room() -> None:
    async with cluster(prefill("p"), decode("d", num_free_blocks=1)) as c:
        with pytest.raises(DeadlineExceededError):
            await c.run(deadline=time.monotonic() + 0.05)
        assert c.dispatcher.num_waiting == 0


async def test_a_mixed_worker_does_everything_in_one_call() -> None:
    m = ScriptedWorker("m", WorkerRole.MIXED, [output(7), output(8, last=True)])
    async with cluster(m) as c:
        assert await c.run() == [7, 8]
        assert m.requests[0].local_prefill
        assert c.record.prefill_worker == ""
