"""The transfer side of a group's ranks, as awaitables with bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TypeVar

from ...runtime.config import ModelInfo
from ...runtime.errors import UnavailableError
from ...runtime.handoff import KvReservation, Provenance, RankEndpoint, TransferSummary, token_prefix_hash
from ...runtime.request import Request
from ..executor import GroupExecutor

CALL_TIMEOUT_S = 10.0  # of calls that wait for no more than one copy
FINISH_TIMEOUT_S = 600.0  # of a whole transfer; the senders give up long before when there is no progress
T = TypeVar("T")


class RankCalls:
    """Asks all ranks of a group. Cancelling a wait does not take a call back.

    Every method raises UnavailableError when a rank is gone or does not answer in time.

    Attributes:
        endpoints: where the ranks take KV.
    """

    def __init__(self, executor: GroupExecutor, endpoints: tuple[RankEndpoint, ...]) -> None:
        self.endpoints = endpoints
        self._executor = executor

    async def open_reservation(self, reservation: KvReservation, block_ids: Sequence[int]) -> None:
        """Take KV into these blocks from now on."""
        await _answer(self._executor.open_reservation(reservation, block_ids), CALL_TIMEOUT_S)

    async def verify_reservation(self, reservation_id: str, provenance: Provenance) -> None:
        """Return if exactly this KV has arrived on every rank.

        Raises:
            ProvenanceError: it has not.
            NotFoundError: the reservation is closed.
        """
        await _answer(self._executor.verify_reservation(reservation_id, provenance), CALL_TIMEOUT_S)

    async def close_reservation(self, reservation_id: str) -> None:
        """When it returns, no rank writes into the blocks any more. Idempotent."""
        await _answer(self._executor.close_reservation(reservation_id), CALL_TIMEOUT_S)

    async def start_handoff(self, handoff_id: str, reservation: KvReservation) -> None:
        """Push the KV of the request of this name, which the engine gets to know afterwards."""
        await _answer(self._executor.start_handoff(handoff_id, reservation), CALL_TIMEOUT_S)

    async def finish_handoff(self, handoff_id: str) -> TransferSummary:
        """The prompt is computed: return when every rank's KV is acknowledged.

        Raises:
            ProvenanceError: decode does not take it for what it wants.
            CancelledError: ``cancel_handoff`` was faster.
        """
        return await _answer(self._executor.finish_handoff(handoff_id), FINISH_TIMEOUT_S)

    async def cancel_handoff(self, handoff_id: str) -> None:
        """When it returns, no rank reads the blocks for sending any more. Idempotent."""
        await _answer(self._executor.cancel_handoff(handoff_id), CALL_TIMEOUT_S)


async def _answer(call: Future[T], timeout_s: float) -> T:
    answer = asyncio.wrap_future(call)
    # It may come when nobody waits any more; and the executor must not find a cancelled future where it puts it.
    answer.add_done_callback(lambda late: late.cancelled() or late.exception())
    await asyncio.wait({answer}, timeout=timeout_s)
    if not answer.done():
        raise UnavailableError(f"the group's ranks have not answered for {timeout_s:g} s", limit=timeout_s)
    return answer.result()


def provenance_of(request: Request, model: ModelInfo) -> Provenance:
    """What KV of this request's prompt, computed by this model, must say of itself."""
    return Provenance(
        request_id=request.request_id,
        epoch=request.epoch,
        model_fingerprint=model.fingerprint,
        prefix_hash=token_prefix_hash(request.prompt_token_ids),
        num_tokens=len(request.prompt_token_ids),
        dtype=model.kv_dtype,
    )
