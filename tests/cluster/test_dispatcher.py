"""Queueing for room, and what the gateway knows of workers between two of their snapshots."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from fuseline.cluster.dispatcher import Dispatcher, WaitedTooLongError
from fuseline.cluster.membership import MembershipView, StaticMembership
from fuseline.cluster.router import ReplicaSnapshot, Router, RoutingQuery
from fuseline.cluster.worker_pool import WorkerPool
from fuseline.proto.fuseline.v1 import worker_pb2
from fuseline.runtime.errors import ResourceExhaustedError, UnavailableError
from fuseline.runtime.role import WorkerRole
from fuseline.tests.cluster.scripted_worker import ScriptedWorker, following, output, until
from fuseline.tests.timing import PROMPTLY_S

QUERY = RoutingQuery(num_prompt_tokens=100, max_tokens=10)  # takes 7 blocks


def prefill(worker_id: str = "p", **snapshot: Any) -> ScriptedWorker:
    return ScriptedWorker(worker_id, WorkerRole.PREFILL, **snapshot)


def decode(worker_id: str = "d", **snapshot: Any) -> ScriptedWorker:
    return ScriptedWorker(worker_id, WorkerRole.DECODE, **snapshot)


def seen(pool: WorkerPool, worker_id: str) -> ReplicaSnapshot:
    return next(r for r in pool.replicas() if r.worker_id == worker_id)


async def test_assignments_count_until_the_snapshots_must_include_them() -> None:
    p, d = prefill(), decode()
    async with following(p, d) as (pool, _):
        assignment = await Dispatcher(pool, Router(16)).dispatch(QUERY, 0, 1)
        assert seen(pool, "p").num_queued_tokens == 100
        assert (seen(pool, "d").num_free_blocks, seen(pool, "d").num_seqs) == (93, 1)
        d.publish(num_generated_tokens=1)
        p.publish(num_queued_tokens=50)
        await until(lambda: seen(pool, "p").num_queued_tokens == 150)
        p.publish(num_queued_tokens=30)
        await until(lambda: seen(pool, "p").num_queued_tokens == 30)
        assert seen(pool, "d").num_free_blocks == 93
        assignment.reserved()
        d.publish(num_free_blocks=92)
        await until(lambda: seen(pool, "d").num_free_blocks == 92)
        assert seen(pool, "d").num_seqs == 1
        assignment.decoding()
        d.publish(num_running=1, num_free_blocks=91)
        await until(lambda: seen(pool, "d").num_free_blocks == 91)
        assert seen(pool, "d").num_seqs == 1
        assignment.release()


async def test_a_burst_spreads_before_any_snapshot_shows_it() -> None:
    async with following(prefill("p0"), prefill("p1"), decode("d0"), decode("d1")) as (pool, _):
        dispatcher = Dispatcher(pool, Router(16))
        decisions = [(await dispatcher.dispatch(QUERY, 0, 1)).decision for _ in range(6)]
        assert [d.prefill_worker for d in decisions] == ["p0", "p1"] * 3
        assert [d.decode_worker for d in decisions] == ["d0", "d1"] * 3


async def test_waiters_go_by_priority_then_arrival_and_nobody_overtakes_the_head() -> None:
    d = decode(num_free_blocks=10)
    async with following(prefill(), d) as (pool, _):
        dispatcher = Dispatcher(pool, Router(16))
        held = await dispatcher.dispatch(QUERY, 0, 1)
        order: list[str] = []

        async def wait(name: str, priority: int, num_tokens: int) -> None:
            assignment = await dispatcher.dispatch(RoutingQuery(num_tokens, 10), priority, 10)
            order.append(name)
            assignment.release()

        async with asyncio.TaskGroup() as group:
            for name, priority, num_tokens in (
                ("late", 1, 120),
                ("first", 0, 120),
                ("small", 1, 1),
                ("urgent", -1, 120),
            ):
                group.create_task(wait(name, priority, num_tokens))
            await until(lambda: dispatcher.num_waiting == 4)
            held.release()
            d.publish()
        assert order == ["urgent", "first", "late", "small"]


async def test_a_waiter_that_leaves_takes_nothing_with_it() -> None:
    d = decode(num_free_blocks=10)
    async with following(prefill(), d) as (pool, _):
        dispatcher = Dispatcher(pool, Router(16))
        held = await dispatcher.dispatch(QUERY, 0, 1)
        leaving = asyncio.create_task(dispatcher.dispatch(QUERY, 0, 10))
        staying = asyncio.create_task(dispatcher.dispatch(QUERY, 0, 10))
        await until(lambda: dispatcher.num_waiting == 2)
        held.release()
        d.publish(num_free_blocks=12)
        await until(leaving.done)
        # Given in the same breath as the cancellation: it must come back.
        given = asyncio.create_task(dispatcher.dispatch(RoutingQuery(1, 1), 0, 10))
        staying.cancel()
        leaving.result().release()
        await asyncio.wait((staying, given))
        given.result().release()
        assert dispatcher.num_waiting == 0
        assert seen(pool, "d").num_free_blocks == 12


async def test_waiting_is_bounded_and_what_can_never_fit_is_told_at_once() -> None:
    async with following(prefill(), decode(num_free_blocks=1)) as (pool, _):
        dispatcher = Dispatcher(pool, Router(16))
        with pytest.raises(WaitedTooLongError):
            await dispatcher.dispatch(QUERY, 0, 0.02)
        with pytest.raises(ResourceExhaustedError, match="largest"):
            await dispatcher.dispatch(RoutingQuery(5000, 10), 0, 10)
        assert dispatcher.num_waiting == 0


async def test_a_worker_counts_only_while_its_watch_lives() -> None:
    p, d = prefill(), decode()
    async with following(p, d) as (pool, _):
        dispatcher = Dispatcher(pool, Router(16))
        await d.__aexit__()
        await until(lambda: not pool.has_ready(WorkerRole.DECODE))
        with pytest.raises(UnavailableError, match="no decode worker"):
            await dispatcher.dispatch(QUERY, 0, 1)


async def test_a_worker_that_membership_drops_is_used_to_the_end_but_not_chosen() -> None:
    d0 = ScriptedWorker("d0", WorkerRole.DECODE, [output(7, last=True)])
    p, d1 = prefill(), decode("d1", num_running=1)
    async with following(p, d0, d1) as (pool, membership):
        dispatcher = Dispatcher(pool, Router(16))
        held = await dispatcher.dispatch(QUERY, 0, 1)
        assert held.decision.decode_worker == "d0"
        membership.set((p.info, d1.info))
        await until(lambda: len(pool.replicas()) == 2)
        assert (await dispatcher.dispatch(QUERY, 0, 1)).decision.decode_worker == "d1"
        assert [event async for event in held.decode.Decode(worker_pb2.DecodeRequest())] == [output(7, last=True)]
        held.release()


async def test_a_worker_of_a_role_from_the_future_is_not_used() -> None:
    p, d = prefill(), decode()
    async with following(p, d) as (pool, _):
        d.publish(role=99)
        await until(lambda: len(pool.replicas()) == 1)
        d.publish(role=worker_pb2.WORKER_ROLE_DECODE)
        await until(lambda: pool.has_ready(WorkerRole.DECODE))


async def test_a_pool_that_cannot_follow_its_workers_says_so(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(StaticMembership):
        async def watch(self) -> AsyncIterator[MembershipView]:
            yield MembershipView(0, ())
            raise RuntimeError("a bug")

    pool = WorkerPool(Broken())
    pool.start()
    async with asyncio.timeout(PROMPTLY_S):
        assert str(await pool.failed()) == "a bug"
    assert "can no longer follow" in caplog.text
    await pool.close()


async def test_draining_is_seen_from_the_worker_and_from_membership() -> None:
    p, d = prefill(), decode()
    async with following(p, d) as (pool, _):
        d.publish(draining=True)
        await until(lambda: not pool.has_ready(WorkerRole.DECODE))
        d.publish(draining=False)
        await until(lambda: pool.has_ready(WorkerRole.DECODE))
