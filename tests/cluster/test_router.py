"""The router's rules, as properties over random clusters and as the cases they were made for."""

from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuseline.cluster.router import (
    LOCAL_PREFILL_BLOCKS,
    BusyError,
    ReplicaSnapshot,
    Router,
    RoutingDecision,
    RoutingQuery,
)
from fuseline.runtime.errors import FuselineError, ResourceExhaustedError, UnavailableError
from fuseline.runtime.role import WorkerRole

BLOCK = 16
ROUTER = Router(BLOCK, max_queued_tokens=4000)
KEYS = tuple(range(1000, 1064))


def prefill(worker_id: str = "p0", **fields: Any) -> ReplicaSnapshot:
    return ReplicaSnapshot(worker_id, WorkerRole.PREFILL, num_total_blocks=100, num_free_blocks=100, **fields)


def decode(worker_id: str = "d0", role: WorkerRole = WorkerRole.DECODE, **fields: Any) -> ReplicaSnapshot:
    fields = {"num_total_blocks": 100, "num_free_blocks": 100, "max_num_seqs": 8} | fields
    return ReplicaSnapshot(worker_id, role, **fields)


def query(num_tokens: int = 100, **fields: Any) -> RoutingQuery:
    keys = KEYS[: num_tokens // BLOCK]
    return RoutingQuery(num_tokens, fields.pop("max_tokens", 64), fields.pop("prefix_keys", keys), **fields)


@st.composite
def replicas(draw: st.DrawFn) -> list[ReplicaSnapshot]:
    count = draw(st.integers(0, 8))
    snapshots = []
    for index in range(count):
        total = draw(st.integers(1, 64))
        snapshots.append(
            ReplicaSnapshot(
                worker_id=f"w{index}",
                role=draw(st.sampled_from(WorkerRole)),
                draining=draw(st.booleans()),
                num_running=draw(st.integers(0, 10)),
                num_waiting=draw(st.integers(0, 10)),
                num_queued_tokens=draw(st.integers(0, 5000)),
                num_total_blocks=total,
                num_free_blocks=draw(st.integers(0, total)),
                max_num_seqs=draw(st.integers(1, 16)),
                cached_prefixes=draw(st.frozensets(st.sampled_from(KEYS), max_size=8)),
            )
        )
    return snapshots


queries = st.builds(
    query,
    num_tokens=st.integers(1, 64 * BLOCK),
    max_tokens=st.integers(1, 10_000),
    failed_workers=st.frozensets(st.sampled_from([f"w{i}" for i in range(8)]), max_size=8),
)


def routed(asked: RoutingQuery, snapshots: list[ReplicaSnapshot]) -> RoutingDecision | type[FuselineError]:
    try:
        return ROUTER.route(asked, snapshots)
    except FuselineError as error:
        return type(error)


def fresh_prefillers(asked: RoutingQuery, snapshots: list[ReplicaSnapshot]) -> list[ReplicaSnapshot]:
    """That take requests and have not failed this one."""
    alive = [s for s in snapshots if s.role is WorkerRole.PREFILL and not s.draining]
    return [s for s in alive if s.worker_id not in asked.failed_workers]


@given(queries, replicas(), st.randoms())
@settings(max_examples=80, deadline=None)
def test_a_decision_names_workers_that_can_do_it_and_no_order_changes_it(
    asked: RoutingQuery, snapshots: list[ReplicaSnapshot], random: Random
) -> None:
    decision = routed(asked, snapshots)
    shuffled = list(snapshots)
    random.shuffle(shuffled)
    assert routed(asked, shuffled) == decision
    if not isinstance(decision, RoutingDecision):
        return
    by_id = {s.worker_id: s for s in snapshots}
    decoder = by_id[decision.decode_worker]
    assert not decoder.draining
    assert decoder.role in (WorkerRole.DECODE, WorkerRole.MIXED)
    assert decision.num_decode_blocks * BLOCK > asked.num_prompt_tokens
    assert decoder.num_free_blocks >= decision.num_decode_blocks
    assert 1 <= decision.num_prefill_tokens <= asked.num_prompt_tokens
    if decision.prefill_worker is not None:
        prefiller = by_id[decision.prefill_worker]
        assert prefiller.role is WorkerRole.PREFILL
        assert not prefiller.draining
    elif decoder.role is WorkerRole.DECODE and fresh_prefillers(asked, snapshots):
        assert decision.num_prefill_tokens <= LOCAL_PREFILL_BLOCKS * BLOCK


@given(queries, replicas())
@settings(max_examples=80, deadline=None)
def test_it_refuses_only_when_no_pair_of_workers_can_do_it(
    asked: RoutingQuery, snapshots: list[ReplicaSnapshot]
) -> None:
    outcome = routed(asked, snapshots)
    decoders = [s for s in snapshots if s.role is not WorkerRole.PREFILL and not s.draining]
    if outcome is UnavailableError:
        assert not decoders
    elif not isinstance(outcome, RoutingDecision):
        candidates = [d for d in decoders if d.worker_id not in asked.failed_workers] or decoders
        needed = -(-(asked.num_prompt_tokens + 1) // BLOCK)
        with_room = [d for d in candidates if d.num_free_blocks >= needed]
        if with_room:
            assert outcome is BusyError
            prefillers = fresh_prefillers(asked, snapshots)
            assert all(d.role is WorkerRole.DECODE for d in with_room)
            may_compute = prefillers or [*with_room, *(s for s in snapshots if s.role is WorkerRole.PREFILL)]
            assert all(s.draining or s.num_queued_tokens > ROUTER.max_queued_tokens for s in may_compute)
        else:
            assert (outcome is BusyError) == any(d.num_total_blocks >= needed for d in candidates)


@given(queries, replicas())
@settings(max_examples=80, deadline=None)
def test_a_worker_that_failed_the_sequence_is_taken_only_when_all_of_its_role_did(
    asked: RoutingQuery, snapshots: list[ReplicaSnapshot]
) -> None:
    decision = routed(asked, snapshots)
    if not isinstance(decision, RoutingDecision):
        return
    if decision.prefill_worker in asked.failed_workers:
        assert not fresh_prefillers(asked, snapshots)
    if decision.decode_worker in asked.failed_workers:
        peers = [s.worker_id for s in snapshots if s.role is not WorkerRole.PREFILL and not s.draining]
        assert set(peers) <= asked.failed_workers


@given(queries, replicas(), st.integers(0, 7), st.integers(1, 5))
@settings(max_examples=80, deadline=None)
def test_more_load_never_attracts(
    asked: RoutingQuery, snapshots: list[ReplicaSnapshot], index: int, more: int
) -> None:
    decision = routed(asked, snapshots)
    if not isinstance(decision, RoutingDecision) or index >= len(snapshots):
        return
    loaded = list(snapshots)
    busier = snapshots[index]
    loaded[index] = replace(
        busier, num_running=busier.num_running + more, num_queued_tokens=busier.num_queued_tokens + 100 * more
    )
    after = ROUTER.route(asked, loaded)
    if decision.decode_worker != busier.worker_id:
        assert after.decode_worker != busier.worker_id
    if decision.prefill_worker != busier.worker_id and after.decode_worker == decision.decode_worker:
        assert after.prefill_worker != busier.worker_id


def test_load_spreads_when_the_caller_adds_its_assignments() -> None:
    workers = {name: decode(name) for name in ("d0", "d1", "d2")}
    for _ in range(9):
        chosen = ROUTER.route(query(), [prefill(), *workers.values()]).decode_worker
        workers[chosen] = replace(workers[chosen], num_running=workers[chosen].num_running + 1)
    assert [w.num_running for w in workers.values()] == [3, 3, 3]


def test_a_cached_prefix_attracts_until_the_queue_outweighs_it() -> None:
    holder = prefill("p1", cached_prefixes=frozenset(KEYS[:6]))
    assert ROUTER.route(query(100), [prefill("p0"), holder, decode()]).prefill_worker == "p1"
    busy = replace(holder, num_queued_tokens=500)
    assert ROUTER.route(query(100), [prefill("p0"), busy, decode()]).prefill_worker == "p0"


def test_the_last_token_is_never_taken_from_the_cache() -> None:
    full = decode(cached_prefixes=frozenset(KEYS))
    assert ROUTER.num_cached_tokens(query(96), full) == 80
    assert ROUTER.num_cached_tokens(query(97), full) == 96
    assert ROUTER.num_cached_tokens(query(97), decode(cached_prefixes=frozenset({KEYS[1]}))) == 32


def test_a_decode_worker_that_holds_the_prompt_computes_the_rest_itself() -> None:
    warm = decode(cached_prefixes=frozenset(KEYS[:6]))
    assert ROUTER.route(query(100), [prefill(), warm]) == RoutingDecision(None, "d0", 4, 7)
    cold = decode(cached_prefixes=frozenset(KEYS[:2]))
    assert ROUTER.route(query(100), [prefill(), cold]).prefill_worker == "p0"
    assert ROUTER.route(query(100), [warm]).prefill_worker is None


def test_decode_workers_compute_prompts_only_while_no_prefill_worker_is_there() -> None:
    for gone in ([], [prefill(draining=True)]):
        assert ROUTER.route(query(1000), [*gone, decode()]) == RoutingDecision(None, "d0", 1000, 63)
    assert ROUTER.route(query(3), [prefill(), decode()]).prefill_worker == "p0"
    failed, too_many = query(1000, failed_workers=frozenset({"p0"})), ROUTER.max_queued_tokens + 1
    assert ROUTER.route(failed, [prefill(), decode()]).prefill_worker is None
    assert ROUTER.route(failed, [prefill(), decode(num_queued_tokens=too_many)]).prefill_worker == "p0"
    for busy in ([prefill(num_queued_tokens=too_many), decode()], [decode(num_queued_tokens=too_many)]):
        with pytest.raises(BusyError, match="long queue"):
            ROUTER.route(query(3), busy)


def test_a_mixed_worker_needs_no_prefill_pool_but_uses_one_for_long_prompts() -> None:
    mixed = decode(role=WorkerRole.MIXED)
    assert ROUTER.route(query(1000), [mixed]).prefill_worker is None
    assert ROUTER.route(query(1000), [mixed, prefill()]).prefill_worker == "p0"
    assert ROUTER.route(query(20), [mixed, prefill()]).prefill_worker is None


def test_a_sequence_beyond_max_num_seqs_goes_elsewhere() -> None:
    full = decode("d0", num_running=2, max_num_seqs=2)
    larger = decode("d1", num_running=3, max_num_seqs=8)
    assert ROUTER.route(query(), [prefill(), full, larger]).decode_worker == "d1"


def test_refusals_say_whether_waiting_helps() -> None:
    busy = decode(num_free_blocks=3)
    with pytest.raises(BusyError, match="7 free KV blocks"):
        ROUTER.route(query(100), [prefill(), busy])
    with pytest.raises(ResourceExhaustedError, match=r"101 KV blocks, .* has 100") as info:
        ROUTER.route(query(1600), [prefill(), busy])
    assert not isinstance(info.value, BusyError)
    with pytest.raises(UnavailableError, match="decode"):
        ROUTER.route(query(), [prefill(), decode(draining=True)])
