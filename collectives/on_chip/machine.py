"""Runs a schedule among simulated CTAs with real values, in one interleaving or in all of them.

Elements are any values that ``combine`` takes: floats, or words that record who contributed in which order. Memory
that nothing has written holds POISON, which makes whatever it is combined with poison. Barriers do what those of the
hardware do: they count, and a wait looks at the parity of the phase only. ``explore`` visits every reachable state.
It takes an operation that touches nothing which sends or copies touch as soon as it can be taken: such a step
commutes with all others, so no outcome is lost.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .schedule import Arm, ClusterBarrier, Exit, Fold, Init, Load, Op, Region, Schedule, Send, Store, Wait, WaitSent

POISON = "poison"
Combine = Callable[[Any, Any], Any]
Inputs = Sequence[Sequence[Sequence[Any]]]  # [epoch][rank][element]


class ScheduleError(Exception):
    """An execution went wrong: a wrong result, a barrier misused, or nobody can go on."""


@dataclass(frozen=True, slots=True)
class _Barrier:
    phase: int = 0
    pending: int = 1
    missing: int = 0  # elements; below zero when they come before they are expected

    def count(self, arrivals: int, expected: int) -> _Barrier:
        if self.pending < arrivals:
            raise ScheduleError("a barrier was armed twice in one phase")
        then = _Barrier(self.phase, self.pending - arrivals, self.missing + expected)
        return _Barrier(self.phase + 1) if then.pending == 0 and then.missing == 0 else then


@dataclass(frozen=True, slots=True)
class _State:
    places: tuple[int, ...]
    flights: tuple[tuple[int, int, tuple[Any, ...] | None], ...]  # sender, place, values once they have been read
    barriers: tuple[tuple[tuple[str, _Barrier], ...] | None, ...]  # None before Init and after Exit
    memory: tuple[tuple[tuple[str, tuple[Any, ...]], ...], ...]


Step = tuple[str, int]  # "op" and a CTA, "read" or "deliver" and a flight's index, or "cluster barrier"


class Machine:
    """One schedule, its inputs, and what its results must be."""

    def __init__(self, schedule: Schedule, inputs: Inputs, combine: Combine) -> None:
        self._schedule = schedule
        self._inputs = inputs
        self._combine = combine
        self._expected = [self._result(epoch) for epoch in range(schedule.num_epochs)]
        self._shared = _shared_regions(schedule)

    def run(self, seed: int) -> None:
        """Take steps in an order drawn from ``seed`` until all CTAs left.

        Raises:
            ScheduleError: a result is wrong, or the execution cannot go on.
        """
        choose = random.Random(seed)
        state = self._start()
        while steps := self._steps(state):
            state = self._take(state, choose.choice(steps))
        self._check_end(state)

    def explore(self, max_states: int) -> int:
        """Take all orders; returns how many states there are.

        Raises:
            ScheduleError: as ``run``, for any order; or there are more than ``max_states``.
        """
        start = self._start()
        seen, stack = {start}, [start]
        while stack:
            state = stack.pop()
            steps = self._steps(state)
            if not steps:
                self._check_end(state)
            local = next((step for step in steps if step[0] == "op" and self._is_local(state, step[1])), None)
            for step in steps if local is None else (local,):
                following = self._take(state, step)
                if following not in seen:
                    seen.add(following)
                    stack.append(following)
            if len(seen) > max_states:
                raise ScheduleError(f"more than {max_states} states")
        return len(seen)

    def _result(self, epoch: int) -> tuple[Any, ...]:
        parts = self._inputs[epoch]
        if self._schedule.gathers:
            return tuple(value for part in parts for value in part)
        totals = list(parts[0])
        for part in parts[1:]:
            totals = [self._combine(total, value) for total, value in zip(totals, part, strict=True)]
        return tuple(totals)

    def _start(self) -> _State:
        num_ctas = self._schedule.num_ctas
        return _State((0,) * num_ctas, (), (None,) * num_ctas, ((),) * num_ctas)

    def _op(self, state: _State, rank: int) -> Op | None:
        program = self._schedule.programs[rank]
        return program[state.places[rank]] if state.places[rank] < len(program) else None

    def _steps(self, state: _State) -> list[Step]:
        steps: list[Step] = []
        ops = [self._op(state, rank) for rank in range(self._schedule.num_ctas)]
        if all(isinstance(op, ClusterBarrier) for op in ops):
            steps.append(("cluster barrier", 0))
        steps += [("op", rank) for rank, op in enumerate(ops) if op is not None and self._ready(state, rank, op)]
        for index, (_, _, values) in enumerate(state.flights):
            steps.append(("read" if values is None else "deliver", index))
        return steps

    def _ready(self, state: _State, rank: int, op: Op) -> bool:
        match op:
            case Wait(barrier, phase):
                return _barriers(state, rank)[barrier].phase % 2 != phase % 2
            case WaitSent():
                return all(sender != rank or values is not None for sender, _, values in state.flights)
            case ClusterBarrier():
                return False
        return True

    def _is_local(self, state: _State, rank: int) -> bool:
        op = self._op(state, rank)
        shared = self._shared[rank]
        match op:
            case Load(region) | Store(region):
                return not any(region.overlaps(other) for other in shared)
            case Fold(destination, sources):
                return not any(region.overlaps(other) for region in (destination, *sources) for other in shared)
            case Send(by_copy=False, source=source):
                return not any(source.overlaps(other) for other in shared)
        return False

    def _take(self, state: _State, step: Step) -> _State:
        kind, number = step
        if kind == "cluster barrier":
            return _State(tuple(place + 1 for place in state.places), state.flights, state.barriers, state.memory)
        if kind == "op":
            return self._execute(state, number)
        sender, place, values = state.flights[number]
        send = self._schedule.programs[sender][place]
        if not isinstance(send, Send):
            raise ScheduleError("only sends are in flight")
        others = state.flights[:number] + state.flights[number + 1 :]
        if values is None:
            flight = (sender, place, self._read(state, sender, send.source))
            return _State(state.places, _sorted((*others, flight)), state.barriers, state.memory)
        memory = self._written(state, send.target, send.destination, values)
        barriers = self._counted(state, send.target, send.barrier, 0, -len(values))
        return _State(state.places, others, barriers, memory)

    def _execute(self, state: _State, rank: int) -> _State:
        place = state.places[rank]
        flights, barriers, memory = state.flights, state.barriers, state.memory
        match self._schedule.programs[rank][place]:
            case Load(destination, epoch):
                memory = self._written(state, rank, destination, tuple(self._inputs[epoch][rank]))
            case Store(source, epoch):
                self._check(rank, epoch, self._read(state, rank, source))
            case Fold(destination, sources):
                memory = self._written(state, rank, destination, self._fold(state, rank, sources))
            case Send() as send:
                values = None if send.by_copy else self._read(state, rank, send.source)
                flights = _sorted((*flights, (rank, place, values)))
            case Arm(barrier, _, num_elements):
                barriers = self._counted(state, rank, barrier, 1, num_elements)
            case Init():
                barriers = _with(barriers, rank, tuple((name, _Barrier()) for name in _names(self._schedule, rank)))
            case Exit():
                barriers = _with(barriers, rank, None)
            case Wait() | WaitSent() | ClusterBarrier():
                pass
        return _State(_with(state.places, rank, place + 1), flights, barriers, memory)

    def _read(self, state: _State, rank: int, region: Region) -> tuple[Any, ...]:
        if state.barriers[rank] is None:
            raise ScheduleError(f"CTA {rank}'s memory is read when it is not there")
        values = dict(state.memory[rank]).get(region.buffer, ())
        return tuple(values[i] if i < len(values) else POISON for i in range(region.begin, region.end))

    def _written(
        self, state: _State, rank: int, region: Region, values: tuple[Any, ...]
    ) -> tuple[tuple[tuple[str, tuple[Any, ...]], ...], ...]:
        if state.barriers[rank] is None:
            raise ScheduleError(f"CTA {rank}'s memory is written when it is not there")
        buffers = dict(state.memory[rank])
        old = list(buffers.get(region.buffer, ()))
        old += [POISON] * (region.end - len(old))
        old[region.begin : region.end] = values
        buffers[region.buffer] = tuple(old)
        return _with(state.memory, rank, tuple(sorted(buffers.items())))

    def _counted(
        self, state: _State, rank: int, barrier: str, arrivals: int, expected: int
    ) -> tuple[tuple[tuple[str, _Barrier], ...] | None, ...]:
        barriers = _barriers(state, rank)
        barriers[barrier] = barriers[barrier].count(arrivals, expected)
        return _with(state.barriers, rank, tuple(barriers.items()))

    def _fold(self, state: _State, rank: int, sources: tuple[Region, ...]) -> tuple[Any, ...]:
        total = self._read(state, rank, sources[0])
        for source in sources[1:]:
            pairs = zip(total, self._read(state, rank, source), strict=True)
            total = tuple(POISON if POISON in (a, b) else self._combine(a, b) for a, b in pairs)
        return total

    def _check(self, rank: int, epoch: int, values: tuple[Any, ...]) -> None:
        if values != self._expected[epoch]:
            raise ScheduleError(f"epoch {epoch}: CTA {rank} has {values}, not {self._expected[epoch]}")

    def _check_end(self, state: _State) -> None:
        stuck = [rank for rank in range(self._schedule.num_ctas) if self._op(state, rank) is not None]
        if stuck:
            raise ScheduleError(f"CTAs {stuck} wait for ever")


def _sorted(flights: tuple[tuple[int, int, tuple[Any, ...] | None], ...]) -> Any:
    """The same set of flights is the same state, whatever the order they began in."""
    return tuple(sorted(flights, key=lambda flight: flight[:2]))


def _with(values: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return (*values[:index], value, *values[index + 1 :])


def _barriers(state: _State, rank: int) -> dict[str, _Barrier]:
    barriers = state.barriers[rank]
    if barriers is None:
        raise ScheduleError(f"a barrier of CTA {rank} is touched when it is not there")
    return dict(barriers)


def _names(schedule: Schedule, rank: int) -> list[str]:
    own = {op.barrier for op in schedule.programs[rank] if isinstance(op, Arm | Wait)}
    return sorted(own | {send.barrier for _, send in _sends(schedule) if send.target == rank})


def _shared_regions(schedule: Schedule) -> list[list[Region]]:
    """For each CTA, the regions that others write or that copies read."""
    shared: list[list[Region]] = [[] for _ in schedule.programs]
    for rank, op in _sends(schedule):
        shared[op.target].append(op.destination)
        if op.by_copy:
            shared[rank].append(op.source)
    return shared


def _sends(schedule: Schedule) -> Iterator[tuple[int, Send]]:
    for rank, program in enumerate(schedule.programs):
        for op in program:
            if isinstance(op, Send):
                yield rank, op
