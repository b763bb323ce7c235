"""Sets of integers as few sorted intervals: which tokens are sent, which have arrived."""

from __future__ import annotations

from bisect import bisect_left, bisect_right


class IntervalSet:
    """Half-open intervals, sorted, neither touching nor overlapping. In-order growth keeps it at one interval."""

    __slots__ = ("_ends", "_starts")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> None:
        """Join ``[start, end)`` to the set; nothing happens when it is empty."""
        if start >= end:
            return
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        if first < last:
            start, end = min(start, self._starts[first]), max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def missing(self, start: int, end: int) -> list[tuple[int, int]]:
        """The parts of ``[start, end)`` that are not in the set, in order."""
        gaps = []
        index = bisect_right(self._ends, start)
        while start < end:
            if index == len(self._starts) or self._starts[index] >= end:
                gaps.append((start, end))
                break
            if start < self._starts[index]:
                gaps.append((start, self._starts[index]))
            start = self._ends[index]
            index += 1
        return gaps

    def covers(self, start: int, end: int) -> bool:
        """Whether all of ``[start, end)`` is in the set."""
        return not self.missing(start, end)
