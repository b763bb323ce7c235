"""Which of a rank's rows are handed off, and where their KV goes: ties step plans to the ``KvSender``.

A handoff is started before its sequence is admitted, so that every layer can be pushed as soon as it is computed.
The sequence may be preempted on the way: its blocks are then anybody's, so the sender lets go of them when the plan
that says so *arrives*, before anything can be written there, and starts over when the sequence is admitted again.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..runtime.errors import AlreadyExistsError, FuselineError, NotFoundError, ResourceExhaustedError
from ..runtime.handoff import KvReservation, TransferSummary
from ..runtime.plan import StepPlan

if TYPE_CHECKING:
    from ..collectives.kv_transfer import KvSender

MAX_HANDOFFS = 4096


@dataclass(frozen=True, slots=True)
class KvPush:
    """KV of tokens ``[start, end)``, which a step completes layer by layer, for a reservation."""

    reservation_id: str
    start: int
    end: int


@dataclass(slots=True)
class _Handoff:
    reservation: KvReservation
    is_sending: bool = False
    error: FuselineError | None = None


@dataclass(slots=True)
class _Row:
    handoff: _Handoff
    num_prompt_tokens: int
    num_computed_tokens: int
    is_fresh: bool = True  # its first step pushes the cached tokens before it as well


class RankHandoffs:
    """Handoffs under way on one rank. Thread-safe; plans must be given in the order in which they arrive."""

    def __init__(self, sender: KvSender) -> None:
        self._sender = sender
        # Guards the rest. Reentrant, since a call to the sender may resolve futures, whose callbacks come back here.
        self._lock = threading.RLock()
        self._handoffs: dict[str, _Handoff] = {}
        self._rows: dict[int, _Row] = {}

    def start(self, handoff_id: str, reservation: KvReservation) -> None:
        """The sequence of this name, to be admitted later, goes to ``reservation``.

        Raises:
            AlreadyExistsError: it has been started.
            ResourceExhaustedError: too many are.
        """
        with self._lock:
            if handoff_id in self._handoffs:
                raise AlreadyExistsError(f"handoff {handoff_id!r} has been started", handoff_id=handoff_id)
            if len(self._handoffs) >= MAX_HANDOFFS:
                raise ResourceExhaustedError(f"{MAX_HANDOFFS} handoffs are under way", limit=MAX_HANDOFFS)
            self._handoffs[handoff_id] = _Handoff(reservation)

    def finish(self, handoff_id: str) -> Future[TransferSummary]:
        """All KV is computed; resolved as ``KvSender.finish`` says. The handoff then is over.

        Raises:
            NotFoundError: there is no such handoff, or its sequence has not been computed.
            FuselineError: why it could not begin.
        """
        with self._lock:
            handoff = self._handoffs.get(handoff_id)
            if handoff is None or not (handoff.is_sending or handoff.error):
                raise NotFoundError(f"handoff {handoff_id!r} has not been computed", handoff_id=handoff_id)
            if handoff.error is not None:
                raise handoff.error
            future = self._sender.finish(handoff.reservation.reservation_id)
        future.add_done_callback(lambda _: self._forget(handoff_id, handoff))
        return future

    def cancel(self, handoff_id: str) -> None:
        """End a handoff; idempotent. When it returns, nothing reads its blocks any more."""
        with self._lock:
            handoff = self._handoffs.pop(handoff_id, None)
            if handoff is not None:
                self._sender.cancel(handoff.reservation.reservation_id)

    def observe(self, plan: StepPlan) -> tuple[KvPush, ...]:
        """A plan has arrived. Returns what to push after each layer when it is computed."""
        with self._lock:
            if not self._handoffs and not self._rows:
                return ()
            for row in plan.released:
                self._release(row)
            for seq in plan.admitted:
                handoff = self._handoffs.get(seq.handoff_id)
                if handoff is not None:
                    self._begin(handoff, seq.block_ids)
                    self._rows[seq.row] = _Row(handoff, seq.num_prompt_tokens, seq.num_computed_tokens)
            pushes = []
            for row, position, length in zip(
                plan.rows.tolist(), plan.positions.tolist(), plan.num_tokens.tolist(), strict=True
            ):
                state = self._rows.get(row)
                if state is not None:
                    start = 0 if state.is_fresh else position
                    state.is_fresh = False
                    state.num_computed_tokens = position + length
                    pushes.append(KvPush(state.handoff.reservation.reservation_id, start, position + length))
            return tuple(pushes)

    def _begin(self, handoff: _Handoff, block_ids: tuple[int, ...]) -> None:
        try:
            self._sender.start(handoff.reservation, block_ids)
        except FuselineError as error:  # that of one request, which learns of it in finish
            handoff.error = error
        else:
            handoff.is_sending = True

    def _release(self, row: int) -> None:
        state = self._rows.pop(row, None)
        if state is not None and state.num_computed_tokens < state.num_prompt_tokens:
            self._sender.cancel(state.handoff.reservation.reservation_id)
            state.handoff.is_sending = False

    def _forget(self, handoff_id: str, handoff: _Handoff) -> None:
        with self._lock:
            if self._handoffs.get(handoff_id) is handoff:
                del self._handoffs[handoff_id]
