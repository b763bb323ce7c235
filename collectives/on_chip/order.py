"""Proves that a schedule has no race, whatever the timing, or says which accesses race.

A schedule's events and what must come before what form a graph: program order within a CTA; a send, the reading of
its source, its delivery; all deliveries of an mbarrier's phase and the arming, the phase's completion, the waits for
it; all CTAs' arrivals at a cluster barrier and everything after it. Programs are straight-line, so every execution is
one of the graph's linear extensions, and two accesses to the same elements of which one writes are ordered in all
executions if and only if a path joins them. Checking the pairs therefore covers all interleavings, for 16 CTAs too;
and since executions without races all compute the same, one of them with the right result speaks for all.

The graph takes it that a phase is completed by the elements meant for it. That is checked, not assumed: whatever
counts towards phase p + 1 of a barrier must come after phase p's completion on a path. In an execution in which it
did not, look at the first such event: all before it went by the graph, so it is after the completion.

A window of epochs stands for any number of them: from epoch to epoch the graph only repeats itself, a buffer is used
again after ``slot_sets`` epochs, and order is transitive. ``epochs_to_prove`` is that window.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import combinations

from .schedule import Arm, ClusterBarrier, Exit, Fold, Init, Load, Region, Schedule, Send, Store, Wait, WaitSent

Event = tuple[str, int, int]  # what, whose, its number: the place in the program, or the cluster barrier's
READ, WRITE, COUNT = "read", "write", "count"


def epochs_to_prove(sets: int) -> int:
    """Epochs after which a schedule whose buffers take turns in ``sets`` sets has shown all it does, twice over."""
    return 2 * sets + 2


@dataclass(frozen=True, slots=True)
class Access:
    """An event touching elements of a CTA's buffer; COUNT is what arming and delivering do to a barrier."""

    event: Event
    kind: str
    region: Region


@dataclass(slots=True)
class _Graph:
    """Events, what must directly precede each, and every CTA's accesses."""

    before: dict[Event, list[Event]] = field(default_factory=lambda: defaultdict(list))
    accesses: dict[int, list[Access]] = field(default_factory=lambda: defaultdict(list))
    counted: dict[tuple[int, str, int], list[Event]] = field(default_factory=lambda: defaultdict(list))
    expected: dict[tuple[int, str, int], int] = field(default_factory=lambda: defaultdict(int))
    waits: list[tuple[int, str, int, Event]] = field(default_factory=list)

    def edge(self, first: Event, then: Event) -> None:
        self.before[then].append(first)
        self.before.setdefault(first, [])


def races(schedule: Schedule) -> list[str]:
    """What is wrong with the order of a schedule, in words; empty when all its executions are free of races.

    Checked: no element is overwritten before it is read or read before it is written, by any CTA's own operations,
    deliveries or copies; nothing touches a CTA's shared memory before its barriers are ready or after it left; every
    phase gets the elements it was armed for and no others; every wait ends.
    """
    graph = _build(schedule)
    ancestors = _ancestors(graph)
    if ancestors is None:
        return ["deadlock: some operations wait for one another"]
    return [*_phase_faults(graph, ancestors), *_conflicts(graph, ancestors)]


def hops(schedule: Schedule) -> int:
    """Deliveries on the longest chain of events: how often the slowest CTA waits for the wire."""
    graph = _build(schedule)
    depth: dict[Event, int] = {}
    for event in _topological(graph) or ():
        inherited = max((depth[first] for first in graph.before[event]), default=0)
        depth[event] = inherited + (event[0] == "deliver")
    return max(depth.values(), default=0)


def _build(schedule: Schedule) -> _Graph:
    graph = _Graph()
    for rank, program in enumerate(schedule.programs):
        previous: Event | None = None
        num_barriers = 0
        for place, op in enumerate(program):
            event: Event = ("op", rank, place)
            if previous is not None:
                graph.edge(previous, event)
            previous = event
            if isinstance(op, ClusterBarrier):
                joined: Event = ("cluster barrier", -1, num_barriers)
                graph.edge(event, joined)
                previous, num_barriers = joined, num_barriers + 1
            _add(graph, schedule, rank, place, event)
    return graph


def _add(graph: _Graph, schedule: Schedule, rank: int, place: int, event: Event) -> None:
    accesses = graph.accesses[rank]
    match schedule.programs[rank][place]:
        case Load(destination):
            accesses.append(Access(event, WRITE, destination))
        case Store(source):
            accesses.append(Access(event, READ, source))
        case Fold(destination, sources):
            accesses.extend(Access(event, READ, source) for source in sources)
            accesses.append(Access(event, WRITE, destination))
        case Send() as send:
            _add_send(graph, rank, place, event, send)
        case Arm(barrier, phase, num_elements):
            graph.expected[rank, barrier, phase] += num_elements
            _count(graph, rank, barrier, phase, event)
        case Wait(barrier, phase):
            graph.edge(_completion(rank, barrier, phase), event)
            graph.waits.append((rank, barrier, phase, event))
        case WaitSent():
            for earlier, op in enumerate(schedule.programs[rank][:place]):
                if isinstance(op, Send) and op.by_copy:
                    graph.edge(("copy", rank, earlier), event)
        case Init() | Exit():
            # Everything a CTA has may be written by whoever had the memory before it, and whoever has it next.
            accesses.extend(Access(event, WRITE, region) for region in _all_of(schedule, rank))
        case ClusterBarrier():
            pass


def _add_send(graph: _Graph, rank: int, place: int, event: Event, send: Send) -> None:
    delivered: Event = ("deliver", rank, place)
    read = event
    if send.by_copy:
        read = ("copy", rank, place)
        graph.edge(event, read)
    graph.edge(read, delivered)
    graph.accesses[rank].append(Access(read, READ, send.source))
    graph.accesses[send.target].append(Access(delivered, WRITE, send.destination))
    graph.expected[send.target, send.barrier, send.phase] -= len(send.source)
    _count(graph, send.target, send.barrier, send.phase, delivered)


def _completion(rank: int, barrier: str, phase: int) -> Event:
    return (f"completion of phase {phase} of {barrier!r}", rank, phase)


def _count(graph: _Graph, rank: int, barrier: str, phase: int, event: Event) -> None:
    graph.edge(event, _completion(rank, barrier, phase))
    graph.counted[rank, barrier, phase].append(event)
    graph.accesses[rank].append(Access(event, COUNT, Region(f"barrier {barrier!r}", 0, 1)))


def _all_of(schedule: Schedule, rank: int) -> list[Region]:
    """Every buffer and barrier of one CTA, whole."""
    sizes: dict[str, int] = {}
    for owner, program in enumerate(schedule.programs):
        for op in program:
            touched: list[Region] = []
            if isinstance(op, Send):
                touched += [op.source] if owner == rank else []
                touched += [op.destination, Region(f"barrier {op.barrier!r}", 0, 1)] if op.target == rank else []
            elif owner == rank and isinstance(op, Load):
                touched.append(op.destination)
            elif owner == rank and isinstance(op, Fold):
                touched += [op.destination, *op.sources]
            for region in touched:
                sizes[region.buffer] = max(sizes.get(region.buffer, 0), region.end)
    return [Region(buffer, 0, end) for buffer, end in sizes.items()]


def _topological(graph: _Graph) -> list[Event] | None:
    """The events in an order that respects the graph; None when there is none."""
    missing = {event: len(firsts) for event, firsts in graph.before.items()}
    after: dict[Event, list[Event]] = defaultdict(list)
    for event, firsts in graph.before.items():
        for first in firsts:
            after[first].append(event)
    ready = [event for event, count in missing.items() if count == 0]
    order = []
    while ready:
        event = ready.pop()
        order.append(event)
        for then in after[event]:
            missing[then] -= 1
            if missing[then] == 0:
                ready.append(then)
    return order if len(order) == len(missing) else None


def _ancestors(graph: _Graph) -> dict[Event, tuple[int, int]] | None:
    """For each event its own bit, and the bits of all events that must come before it."""
    order = _topological(graph)
    if order is None:
        return None
    found: dict[Event, tuple[int, int]] = {}
    for number, event in enumerate(order):
        mask = 0
        for first in graph.before[event]:
            bit, above = found[first]
            mask |= bit | above
        found[event] = (1 << number, mask)
    return found


def _precedes(ancestors: dict[Event, tuple[int, int]], first: Event, then: Event) -> bool:
    return bool(ancestors[then][1] & ancestors[first][0])


def _phase_faults(graph: _Graph, ancestors: dict[Event, tuple[int, int]]) -> list[str]:
    faults = []
    for (rank, barrier, phase), missing in graph.expected.items():
        if missing:
            faults.append(f"CTA {rank} waits for {missing:+d} elements in phase {phase} of {barrier!r} than it gets")
        if phase == 0:
            continue
        before = _completion(rank, barrier, phase - 1)
        for event in graph.counted[rank, barrier, phase]:
            if before not in ancestors or not _precedes(ancestors, before, event):
                faults.append(f"{_name(event)} may count towards phase {phase - 1} of {barrier!r} of CTA {rank}")
    for rank, barrier, phase, wait in graph.waits:
        following = _completion(rank, barrier, phase + 1)
        if (rank, barrier, phase) not in graph.counted:
            faults.append(f"{_name(wait)} waits for phase {phase} of {barrier!r}, which nobody completes")
        if following in ancestors and not _precedes(ancestors, wait, following):
            faults.append(f"{_name(wait)} may find phase {phase + 1} of {barrier!r} completed, of its own parity")
    return faults


def _conflicts(graph: _Graph, ancestors: dict[Event, tuple[int, int]]) -> list[str]:
    faults = []
    for rank, accesses in graph.accesses.items():
        by_buffer: dict[str, list[Access]] = defaultdict(list)
        for access in accesses:
            by_buffer[access.region.buffer].append(access)
        for touching in by_buffer.values():
            for one, other in combinations(touching, 2):
                if one.kind == other.kind != WRITE or not one.region.overlaps(other.region):
                    continue
                if one.event == other.event or _precedes(ancestors, one.event, other.event):
                    continue
                if not _precedes(ancestors, other.event, one.event):
                    faults.append(
                        f"{_name(one.event)} {one.kind}s and {_name(other.event)} {other.kind}s "
                        f"{one.region.buffer!r} of CTA {rank} in no order"
                    )
    return faults


def _name(event: Event) -> str:
    what, rank, place = event
    return f"{what} {place} of CTA {rank}"
