"""What ``fuseline serve`` tells of its replicas: while they come up, and when one is lost later."""

from __future__ import annotations

from .membership import ReplicaState
from .messages import ControllerStatus, ReplicaRow
from .status import progress_text
from .wording import counted

NEWS_S = 2.0  # between two lines about bytes read


class StartNews:
    """What is new of replicas that come up: every change of their states at once, bytes read every NEWS_S."""

    def __init__(self) -> None:
        self._states = ""
        self._line = ""
        self._told_at = 0.0

    def news(self, status: ControllerStatus, now: float) -> str:
        """A line, or nothing if there is nothing to say yet."""
        num_wanted = status.target.prefill + status.target.decode
        num_ready = sum(replica.state is ReplicaState.READY for replica in status.replicas)
        troubles = "".join(f"; {row.worker_id}: {row.message}" for row in _troubled(status))
        states = f"{num_ready} of {counted(num_wanted, 'worker')} ready{troubles}"
        loading = [replica.loading for replica in status.replicas if replica.state is ReplicaState.STARTING]
        read = progress_text(sum(x.done_bytes for x in loading), sum(x.total_bytes for x in loading))
        line = f"loading on {status.config.device}: " + "; ".join(filter(None, (read, states)))
        if line == self._line or (states == self._states and now - self._told_at < NEWS_S):
            return ""
        self._states, self._line, self._told_at = states, line, now
        return line


class LossNews:
    """What is new of replicas that were lost: each loss once."""

    def __init__(self) -> None:
        self._num_restarts: dict[str, int] = {}  # by slot, whose replicas come and go

    def news(self, status: ControllerStatus) -> list[str]:
        """A line for each."""
        told, self._num_restarts = self._num_restarts, {_slot(row): row.num_restarts for row in status.replicas}
        losses = {_slot(row): row for row in _troubled(status) if row.num_restarts > told.get(_slot(row), 0)}
        return [f"{row.worker_id}: {row.message}" for row in losses.values()]


def _slot(row: ReplicaRow) -> str:
    """Its name, without what tells a slot's replicas apart."""
    return "-".join(row.worker_id.split("-")[:2])


def _troubled(status: ControllerStatus) -> list[ReplicaRow]:
    return [row for row in status.replicas if row.message and row.num_restarts]
