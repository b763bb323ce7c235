"""Compares what should be with what is and says what to do. Pure: the clock is an argument, nothing is kept.

A pool has *slots*, numbered from 0; a replica fills one, and when it dies its replacement (with another worker id)
takes the lowest free one, or sooner one that has been through something: a replica that failed is replaced in its own
slot. What a slot has been through, its restarts and the reason of the last failure, is a ``SlotHistory`` that the
caller keeps and hands in again::

    free slot --start--> STARTING -------> READY --drain--> DRAINING --> DRAINED --stop--> free slot
                  ^          |               |                 |
                  |          +----failure----+                 +--- too slow: stop ---> free slot
                  +--- after a delay that grows with the failures in a row

A replica that drains counts no more: its successor is started at once. A replica that fails, however it fails, is
stopped and its slot waits: not at all after the first failure (a killed worker is replaced promptly), then
``first_delay_s``, doubling up to ``max_delay_s``. After ``failures_until_failed`` failures in a row the slot shows
FAILED with the reason; it is still tried again, every ``max_delay_s``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..runtime.errors import InvalidArgumentError
from ..runtime.role import WorkerRole
from .cluster_config import check_num_replicas
from .membership import ReplicaState

POOLS = (WorkerRole.PREFILL, WorkerRole.DECODE)


@dataclass(frozen=True, slots=True)
class Target:
    """How many replicas each pool should have.

    Raises:
        InvalidArgumentError: no decode replica, or too many of either.
    """

    prefill: int
    decode: int

    def __post_init__(self) -> None:
        check_num_replicas("prefill", self.prefill, 0)
        check_num_replicas("decode", self.decode, 1)

    def size(self, pool: WorkerRole) -> int:
        """Replicas wanted in ``pool``."""
        return self.prefill if pool is WorkerRole.PREFILL else self.decode

    def role(self, pool: WorkerRole) -> WorkerRole:
        """What the pool's workers do: without a prefill pool, decode workers do everything."""
        return WorkerRole.MIXED if pool is WorkerRole.DECODE and not self.prefill else pool


@dataclass(frozen=True, slots=True, order=True)
class Slot:
    """A place in a pool, PREFILL or DECODE."""

    pool: WorkerRole
    index: int

    def __post_init__(self) -> None:
        if self.pool not in POOLS or self.index < 0:
            raise InvalidArgumentError(f"no such slot: {self.pool} {self.index}", field="slot", value=str(self.index))

    def __str__(self) -> str:
        return f"{self.pool}-{self.index}"


@dataclass(frozen=True, slots=True)
class Replica:
    """One replica as observed; times are on the caller's clock.

    Attributes:
        since: when it entered ``state``.
        ready_at: when it became READY, if it did.
        load: requests under way there; decides who goes first when a pool shrinks.
        reason: why it FAILED.
    """

    worker_id: str
    slot: Slot
    role: WorkerRole
    state: ReplicaState
    since: float
    started_at: float
    ready_at: float | None = None
    load: int = 0
    reason: str = ""

    @property
    def counts(self) -> bool:
        """Whether it fills one of the places that the target asks for."""
        return self.state in (ReplicaState.STARTING, ReplicaState.READY)


@dataclass(frozen=True, slots=True)
class Limits:
    """Times and counts that reconciliation goes by; see the module's text."""

    start_timeout_s: float = 600.0
    drain_timeout_s: float = 300.0
    first_delay_s: float = 1.0
    max_delay_s: float = 60.0
    reset_after_s: float = 60.0
    failures_until_failed: int = 3


@dataclass(frozen=True, slots=True)
class SlotHistory:
    """What a slot has been through.

    Attributes:
        num_restarts: failures since the slot was first used.
        num_failures: failures in a row; a replica that was READY for ``reset_after_s`` starts the count anew.
        retry_at: not to be started before that time.
        reason: of the last failure.
    """

    num_restarts: int = 0
    num_failures: int = 0
    retry_at: float = 0.0
    reason: str = ""

    def after_failure(self, replica: Replica, reason: str, now: float, limits: Limits) -> SlotHistory:
        """The history once ``replica``, which stood in the slot, has failed at ``now``."""
        was_well = replica.ready_at is not None and now - replica.ready_at >= limits.reset_after_s
        num_failures = 1 if was_well else self.num_failures + 1
        return SlotHistory(self.num_restarts + 1, num_failures, now + _delay(num_failures, limits), reason)

    def is_failed(self, limits: Limits) -> bool:
        """Whether the slot should be shown as FAILED."""
        return self.num_failures >= limits.failures_until_failed


def _delay(num_failures: int, limits: Limits) -> float:
    if num_failures < 2:
        return 0.0
    if num_failures >= limits.failures_until_failed:
        return limits.max_delay_s
    return min(limits.max_delay_s, limits.first_delay_s * 2.0 ** (num_failures - 2))


@dataclass(frozen=True, slots=True)
class Start:
    """Start a replica in a free slot."""

    slot: Slot
    role: WorkerRole


@dataclass(frozen=True, slots=True)
class SetRole:
    """Let a replica serve another role from now on."""

    worker_id: str
    role: WorkerRole


@dataclass(frozen=True, slots=True)
class Drain:
    """Let a replica finish what it has, and nothing more."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class Stop:
    """End a replica's processes now, if there still are any, and forget it."""

    worker_id: str
    reason: str


Action = Start | SetRole | Drain | Stop


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now, and when to ask again if nothing changes before.

    Attributes:
        actions: stops come first, so that what they free is there for the starts.
        histories: of the slots in use, to be handed in next time.
        waiting: slots that the target wants filled but that must wait for their ``retry_at``.
        wake_at: the next moment at which time alone changes the decision; None when there is none.
    """

    actions: tuple[Action, ...]
    histories: Mapping[Slot, SlotHistory]
    waiting: tuple[Slot, ...]
    wake_at: float | None


def reconcile(
    target: Target,
    replicas: Sequence[Replica],
    histories: Mapping[Slot, SlotHistory],
    now: float,
    limits: Limits,
) -> Decision:
    """Decide. Every action must be carried out, and its effect be seen in ``replicas``, before the next call."""
    histories = dict(histories)
    stops: list[Action] = []
    staying: list[Replica] = []
    wakes: list[float] = []
    for replica in replicas:
        stop, failed, due = _end_of_life(replica, now, limits)
        if stop is None:
            staying.append(replica)
        else:
            stops.append(stop)
        if stop is not None and failed:
            history = histories.get(replica.slot, SlotHistory())
            histories[replica.slot] = history.after_failure(replica, stop.reason, now, limits)
        wakes += [due] if due is not None else []
    changes: list[Action] = []
    waiting: list[Slot] = []
    in_use = {replica.slot for replica in staying}
    for pool in POOLS:
        live = sorted((item for item in staying if item.slot.pool is pool and item.counts), key=_leaves_first)
        surplus = max(len(live) - target.size(pool), 0)
        role = target.role(pool)
        changes += [retire(replica) for replica in live[:surplus]]
        # One that starts may have no process yet that could be told; it is told when it is ready.
        changes += [
            SetRole(replica.worker_id, role)
            for replica in live[surplus:]
            if replica.role is not role and replica.state is ReplicaState.READY
        ]
        for slot in _free_slots(pool, live, histories, target.size(pool) - len(live)):
            in_use.add(slot)
            retry_at = histories.get(slot, SlotHistory()).retry_at
            if retry_at > now:
                waiting.append(slot)
                wakes.append(retry_at)
            else:
                changes.append(Start(slot, role))
    kept = {slot: history for slot, history in histories.items() if slot in in_use}
    return Decision((*stops, *changes), kept, tuple(waiting), min(wakes, default=None))


def _end_of_life(replica: Replica, now: float, limits: Limits) -> tuple[Stop | None, bool, float | None]:
    """The stop of a replica that is done for and whether it failed, or when it will have taken too long."""
    match replica.state:
        case ReplicaState.FAILED:
            return Stop(replica.worker_id, replica.reason), True, None
        case ReplicaState.DRAINED:
            return Stop(replica.worker_id, "drained"), False, None
        case ReplicaState.STARTING:
            due = replica.started_at + limits.start_timeout_s
            if now >= due:
                return Stop(replica.worker_id, f"not ready within {limits.start_timeout_s:g} s"), True, None
            return None, False, due
        case ReplicaState.DRAINING:
            due = replica.since + limits.drain_timeout_s
            if now >= due:
                return Stop(replica.worker_id, f"not drained within {limits.drain_timeout_s:g} s"), False, None
            return None, False, due
        case _:
            return None, False, None


def _leaves_first(replica: Replica) -> tuple[bool, int, float, str]:
    """Order of leaving: what serves nobody yet, then the least loaded, then the youngest."""
    return replica.state is ReplicaState.READY, replica.load, -replica.started_at, replica.worker_id


def retire(replica: Replica) -> Action:
    """How a replica that counts is taken out: one that serves nobody yet is simply stopped."""
    if replica.state is ReplicaState.STARTING:
        return Stop(replica.worker_id, "not wanted any more")
    return Drain(replica.worker_id)


def _free_slots(
    pool: WorkerRole, live: Iterable[Replica], histories: Mapping[Slot, SlotHistory], count: int
) -> list[Slot]:
    """So many slots that no live replica stands in: those with a history, then the lowest."""
    taken = {replica.slot for replica in live}
    known = sorted(slot for slot in histories if slot.pool is pool and slot not in taken)
    # Among so many new ones at least ``count`` are free.
    lowest = (Slot(pool, index) for index in range(len(taken) + len(known) + max(count, 0)))
    return [*known, *(slot for slot in lowest if slot not in taken and slot not in histories)][: max(count, 0)]
