"""When which sequence must end at the latest."""

from __future__ import annotations

import heapq

from .sequence import Sequence


class Expirations:
    """A heap of times. What counts is ``Sequence.expires_at``; entries that disagree with it are void."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Sequence]] = []
        self._num_entries = 0  # ever made: breaks ties

    def set(self, seq: Sequence, time: float | None, num_live: int) -> None:
        """Let a sequence end at ``time``, or never. ``num_live`` bounds what void entries may add up to."""
        seq.expires_at = time
        if time is None:
            return
        if len(self._heap) > 2 * num_live + 64:
            self._heap = [entry for entry in self._heap if entry[2].expires_at == entry[0]]
            heapq.heapify(self._heap)
        self._num_entries += 1
        heapq.heappush(self._heap, (time, self._num_entries, seq))

    @property
    def next(self) -> float | None:
        """The earliest time set."""
        heap = self._heap
        while heap and heap[0][2].expires_at != heap[0][0]:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def pop_until(self, now: float) -> list[Sequence]:
        """Sequences whose time has come, earliest first; they have none any more."""
        expired = []
        while (time := self.next) is not None and time <= now:
            seq = heapq.heappop(self._heap)[2]
            seq.expires_at = None
            expired.append(seq)
        return expired
