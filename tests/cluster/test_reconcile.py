"""Reconciliation: examples of each rule, then properties over arbitrary states of the world."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuseline.cluster.membership import ReplicaState
from fuseline.cluster.reconcile import (
    POOLS,
    Decision,
    Drain,
    Limits,
    Replica,
    SetRole,
    Slot,
    SlotHistory,
    Start,
    Stop,
    Target,
    reconcile,
)
from fuseline.runtime.errors import InvalidArgumentError
from fuseline.runtime.role import WorkerRole

PREFILL, DECODE, MIXED = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.MIXED
LIMITS = Limits(start_timeout_s=20, drain_timeout_s=30, first_delay_s=1, max_delay_s=8, reset_after_s=10)


def replica(name: str, state: ReplicaState = ReplicaState.READY, load: int = 0, age: float = 5.0) -> Replica:
    """A replica of the pool and slot in its name, seen at time 100."""
    pool, index = name.split("-")[:2]
    slot = Slot(WorkerRole(pool), int(index))
    ready_at = 100 - age if state is ReplicaState.READY else None
    return Replica(name, slot, slot.pool, state, 100 - age, 100 - age, ready_at, load)


def decide(target: Target, *replicas: Replica, histories: dict[Slot, SlotHistory] | None = None) -> Decision:
    return reconcile(target, replicas, histories or {}, 100.0, LIMITS)


def test_a_failed_replica_is_replaced_in_its_own_slot_though_a_lower_one_is_free() -> None:
    gone = replica("decode-1", ReplicaState.FAILED)
    decision = decide(Target(0, 1), gone)
    assert decision.actions[1:] == (Start(Slot(DECODE, 1), MIXED),)
    assert decision.histories[Slot(DECODE, 1)].num_restarts == 1
    both = decide(Target(0, 2), gone)
    assert set(both.actions[1:]) == {Start(Slot(DECODE, 1), MIXED), Start(Slot(DECODE, 0), MIXED)}


def test_an_empty_cluster_is_filled() -> None:
    assert decide(Target(1, 2)).actions == (
        Start(Slot(PREFILL, 0), PREFILL),
        Start(Slot(DECODE, 0), DECODE),
        Start(Slot(DECODE, 1), DECODE),
    )


def test_a_cluster_on_target_is_left_alone() -> None:
    decision = decide(Target(1, 1), replica("prefill-0"), replica("decode-0"))
    assert decision.actions == ()
    assert decision.wake_at is None


def test_without_a_prefill_pool_decode_workers_do_everything() -> None:
    assert decide(Target(0, 1)).actions == (Start(Slot(DECODE, 0), MIXED),)
    changed = decide(Target(0, 1), replica("prefill-0"), replica("decode-0"))
    assert set(changed.actions) == {Drain("prefill-0"), SetRole("decode-0", MIXED)}


@pytest.mark.parametrize(
    ("replicas", "leaves"),
    [
        ((replica("decode-0", load=3), replica("decode-1", load=1), replica("decode-2", load=2)), Drain("decode-1")),
        ((replica("decode-0", age=9), replica("decode-1", age=2), replica("decode-2", age=5)), Drain("decode-1")),
        (
            (replica("decode-0"), replica("decode-1"), replica("decode-2", ReplicaState.STARTING)),
            Stop("decode-2", "not wanted any more"),
        ),
    ],
    ids=["least loaded", "youngest", "not yet ready"],
)
def test_a_shrinking_pool_drains_who_is_missed_least(replicas: tuple[Replica, ...], leaves: Drain | Stop) -> None:
    assert decide(Target(0, 2), *(replace(item, role=MIXED) for item in replicas)).actions == (leaves,)


def test_a_draining_replica_has_its_successor_at_once() -> None:
    decision = decide(Target(1, 1), replica("prefill-0"), replica("decode-0", ReplicaState.DRAINING))
    assert decision.actions == (Start(Slot(DECODE, 0), DECODE),)
    assert decision.wake_at == 95 + LIMITS.drain_timeout_s


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (replica("decode-1", ReplicaState.DRAINED), "drained"),
        (replica("decode-1", ReplicaState.DRAINING, age=30), "not drained within 30 s"),
    ],
)
def test_a_drained_replica_is_stopped_without_blame(item: Replica, reason: str) -> None:
    decision = decide(Target(1, 1), replica("prefill-0"), replica("decode-0"), item)
    assert decision.actions == (Stop("decode-1", reason),)
    assert decision.histories == {}


def test_a_replica_that_takes_too_long_to_start_has_failed() -> None:
    decision = decide(Target(1, 1), replica("prefill-0"), replica("decode-0", ReplicaState.STARTING, age=20))
    assert decision.actions == (Stop("decode-0", "not ready within 20 s"), Start(Slot(DECODE, 0), DECODE))
    assert decision.histories[Slot(DECODE, 0)].reason == "not ready within 20 s"


def test_failures_in_a_row_are_retried_ever_more_slowly_and_then_shown() -> None:
    delays, shown, history, now = [], [], SlotHistory(), 0.0
    for _ in range(6):
        dead = Replica("w", Slot(DECODE, 0), DECODE, ReplicaState.FAILED, now, now, None, 0, "boom")
        decision = reconcile(Target(0, 1), [dead], {Slot(DECODE, 0): history}, now, LIMITS)
        history = decision.histories[Slot(DECODE, 0)]
        delays.append(history.retry_at - now)
        shown.append(history.is_failed(LIMITS))
        waits = history.retry_at > now
        assert decision.waiting == ((Slot(DECODE, 0),) if waits else ())
        assert decision.wake_at == (history.retry_at if waits else None)
        assert [type(action) for action in decision.actions] == [Stop] if waits else [Stop, Start]
        now = history.retry_at
    assert delays == [0, 1, 8, 8, 8, 8]
    assert shown == [False, False, True, True, True, True]
    assert history.num_restarts == 6
    assert history.reason == "boom"


def test_a_replica_that_was_well_for_long_is_replaced_at_once() -> None:
    worn = SlotHistory(num_restarts=7, num_failures=7)
    for ready_for, failures in ((9, 8), (10, 1)):
        dead = Replica("w", Slot(DECODE, 0), DECODE, ReplicaState.FAILED, 100, 50, 100 - ready_for, 0, "killed")
        history = decide(Target(0, 1), dead, histories={Slot(DECODE, 0): worn}).histories[Slot(DECODE, 0)]
        assert (history.num_failures, history.num_restarts) == (failures, 8)


def test_histories_of_slots_out_of_use_are_forgotten() -> None:
    histories = {Slot(DECODE, 0): SlotHistory(1), Slot(DECODE, 4): SlotHistory(1)}
    assert decide(Target(0, 1), histories=histories).histories == {Slot(DECODE, 0): SlotHistory(1)}


def test_a_target_without_decode_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="decode must have 1 to 1024 replicas, got 0"):
        Target(1, 0)


targets = st.builds(Target, st.integers(0, 4), st.integers(1, 4))
times = st.floats(0, 100)
slots = st.builds(Slot, st.sampled_from(POOLS), st.integers(0, 5))
histories = st.dictionaries(slots, st.builds(SlotHistory, st.integers(0, 9), st.integers(0, 9), st.floats(0, 110)))


@st.composite
def worlds(draw: st.DrawFn) -> list[Replica]:
    found = []
    for index in range(draw(st.integers(0, 8))):
        slot = draw(slots)
        since = draw(times)
        state = draw(st.sampled_from(list(ReplicaState)))
        role = draw(st.sampled_from([PREFILL] if slot.pool is PREFILL else [DECODE, MIXED]))
        ready_at = since if state is ReplicaState.READY else None
        started_at = draw(st.floats(0, since))
        found.append(Replica(f"w{index}", slot, role, state, since, started_at, ready_at, draw(st.integers(0, 9))))
    return found


def carry_out(world: list[Replica], decision: Decision, now: float) -> list[Replica]:
    """What the world looks like once the actions have begun to work."""
    by_id = {item.worker_id: item for item in world}
    for action in decision.actions:
        match action:
            case Stop(worker_id):
                del by_id[worker_id]
            case Drain(worker_id):
                by_id[worker_id] = replace(by_id[worker_id], state=ReplicaState.DRAINING, since=now)
            case SetRole(worker_id, role):
                by_id[worker_id] = replace(by_id[worker_id], role=role)
            case Start(slot, role):
                name = f"{slot}@{now}"
                assert name not in by_id
                by_id[name] = Replica(name, slot, role, ReplicaState.STARTING, now, now)
    return list(by_id.values())


def live(world: list[Replica], pool: WorkerRole) -> list[Replica]:
    return [item for item in world if item.slot.pool is pool and item.counts]


@settings(max_examples=300, deadline=None)
@given(targets, worlds(), histories)
def test_one_decision_neither_overshoots_nor_takes_what_is_needed(
    target: Target, world: list[Replica], histories: dict[Slot, SlotHistory]
) -> None:
    now = 100.0
    decision = reconcile(target, world, histories, now, LIMITS)
    after = carry_out(world, decision, now)
    gone = {action.worker_id for action in decision.actions if isinstance(action, Stop | Drain)}
    for pool in POOLS:
        size = target.size(pool)
        before, left = live(world, pool), live(after, pool)
        assert len(left) <= max(size, 0)
        # Ready replicas leave only from above the target; the youngest of equals goes first.
        ready = [item for item in before if item.state is ReplicaState.READY]
        assert len([item for item in ready if item.worker_id not in gone]) == min(len(ready), size)
        assert {item.slot for item in left if item.worker_id.endswith(f"@{now}")}.isdisjoint(
            item.slot for item in before if item.worker_id not in gone
        )
        # Whatever is missing waits for its time.
        waiting = [slot for slot in decision.waiting if slot.pool is pool]
        assert len(left) + len(waiting) == size
    # A drain, once begun, is not cut short before its time.
    for item in world:
        if item.state is ReplicaState.DRAINING and now < item.since + LIMITS.drain_timeout_s:
            assert item.worker_id not in gone


@settings(max_examples=150, deadline=None)
@given(targets, worlds(), histories, st.lists(st.sampled_from(["ready", "die", "dawdle"]), max_size=30), st.data())
def test_from_any_state_the_cluster_converges_once_replicas_stop_failing(
    target: Target,
    world: list[Replica],
    histories: dict[Slot, SlotHistory],
    troubles: list[str],
    data: st.DataObject,
) -> None:
    now = 100.0
    for round_index in range(200):
        decision = reconcile(target, world, histories, now, LIMITS)
        histories, world = dict(decision.histories), carry_out(world, decision, now)
        assert len(histories) <= len(world) + target.prefill + target.decode
        fate = troubles[round_index] if round_index < len(troubles) else "ready"
        moved = []
        for item in world:
            if item.state is ReplicaState.STARTING and fate == "ready":
                item = replace(item, state=ReplicaState.READY, since=now, ready_at=now)
            elif item.counts and fate == "die" and data.draw(st.booleans()):
                item = replace(item, state=ReplicaState.FAILED, since=now, reason="killed")
            elif item.state is ReplicaState.DRAINING and fate == "ready":
                item = replace(item, state=ReplicaState.DRAINED, since=now)
            moved.append(item)
        settled = moved == world and not decision.actions
        world = moved
        if settled and round_index >= len(troubles):
            if decision.wake_at is None:
                break
            now = max(now, decision.wake_at)
        else:
            now += 1
    else:
        pytest.fail("still acting after 200 rounds")
    for pool in POOLS:
        ready = [item for item in world if item.slot.pool is pool]
        assert [item.state for item in ready] == [ReplicaState.READY] * target.size(pool)
        assert {item.role for item in ready} <= {target.role(pool)}
        assert len({item.slot for item in ready}) == len(ready) or any(
            not i.worker_id.startswith(str(i.slot)) for i in ready
        )
