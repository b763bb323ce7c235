"""The decode side of a request: reserve, take the KV, commit, decode; or compute the prompt here as well.

::

    Decode ----> engine.reserve -> ranks open -> "reserved" ---- waits ----> outputs
                                                                   ^
    Commit ----------------------> ranks verify, ranks close -> engine.commit

Every way out runs the same cleanup: no rank may write any more (close on all of them), then the engine frees the
blocks. What was not verified on every rank never reaches the engine, so it can never become text.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass
from typing import Any

import grpc.aio

from ...proto.fuseline.v1 import kv_transfer_pb2 as pb
from ...proto.fuseline.v1 import worker_pb2, worker_pb2_grpc
from ...runtime.config import ModelInfo
from ...runtime.errors import (
    AlreadyExistsError,
    DeadlineExceededError,
    FuselineError,
    InvalidArgumentError,
    NotFoundError,
    ProvenanceError,
    UnavailableError,
)
from ...runtime.handoff import KvReservation
from ...runtime.request import Phase, Request
from .. import wire
from ..engine_thread import EngineThread
from ..grpc_errors import answering
from ..request_stream import RequestStream
from .leases import Leases, deadline_of
from .ranks import RankCalls, provenance_of

RESERVATION_ID_BYTES = 24

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(slots=True)
class _Reservation:
    """Blocks that other workers may write into, until ``is_closed``.

    Attributes:
        outcome: resolved by the commit, or failed with what the Decode stream shall end with.
        is_committing: a commit is being verified; a second one is refused.
        is_closed: no rank writes into the blocks any more.
    """

    reservation_id: str
    request: Request
    outcome: asyncio.Future[None]
    is_committing: bool = False
    is_closed: bool = False

    def settle(self, error: FuselineError | None) -> None:
        """Tell the Decode stream; the first outcome counts."""
        if self.outcome.done():
            return
        if error is None:
            self.outcome.set_result(None)
        else:
            self.outcome.set_exception(error)
            self.outcome.exception()  # the stream may be gone


class DecodeServicer(worker_pb2_grpc.DecodeServiceServicer):
    """``DecodeService``, and the ``Commit`` and ``Abort`` of ``KvTransfer``."""

    def __init__(self, engine: EngineThread, ranks: RankCalls, leases: Leases, model: ModelInfo) -> None:
        self._engine = engine
        self._ranks = ranks
        self._leases = leases
        self._model = model
        self._reservations: dict[str, _Reservation] = {}

    async def Decode(self, message: worker_pb2.DecodeRequest, context: Context) -> None:
        """See worker.proto. A stream that ends well ends with an output that says STOP or LENGTH; every other end is
        a status.
        """
        async with answering(context):
            with self._leases.hold():
                phase = Phase.FULL if message.local_prefill else Phase.DECODE
                request = wire.request_from_wire(message.sequence, phase, deadline_of(context))
                stream = await self._engine.open_stream(request.request_id)
                if message.local_prefill:
                    await self._compute(request, stream, context)
                else:
                    await self._take_over(request, stream, context)

    async def commit(self, message: pb.CommitRequest, context: Context) -> pb.CommitResponse:
        """All KV of a reservation has been pushed: verify it on every rank, then let the request decode.

        A reservation that fails here is over: its Decode stream ends with UNAVAILABLE, so that it is tried again.
        """
        async with answering(context):
            reservation = self._reservations.get(message.reservation_id)
            if reservation is None:
                raise NotFoundError("no such KV reservation is open")
            if reservation.is_committing:
                raise AlreadyExistsError("the KV reservation is being committed already")
            reservation.is_committing = True
            try:
                await self._commit(message, reservation)
            except FuselineError as error:
                self._leases.num_provenance_failures += isinstance(error, ProvenanceError)
                reservation.settle(UnavailableError(f"the handoff was refused: {error.message}", cause=error.code))
                raise
            except asyncio.CancelledError:  # how far it came, nobody can tell the prefill worker now
                reservation.settle(UnavailableError("the handoff was cut off"))
                raise
            reservation.settle(None)
        return pb.CommitResponse()

    async def abort(self, message: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        """The prefill side gives up. Does nothing when the reservation is gone or committed."""
        reservation = self._reservations.get(message.reservation_id)
        if reservation is not None:
            reservation.settle(UnavailableError(f"the prefill worker gave up: {message.reason[:200]}"))
        return pb.AbortResponse()

    async def _compute(self, request: Request, stream: RequestStream, context: Context) -> None:
        try:
            await self._engine.add(request)
            await _relay(stream, context)
        finally:
            await self._leases.clean_up(self._end(stream, None))

    async def _take_over(self, request: Request, stream: RequestStream, context: Context) -> None:
        reservation: _Reservation | None = None
        try:
            reserved = await self._engine.reserve(request)
            outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            reservation = _Reservation(secrets.token_urlsafe(RESERVATION_ID_BYTES), request, outcome)
            offer = KvReservation(
                reservation.reservation_id,
                provenance_of(request, self._model),
                reserved.num_cached_tokens,
                self._ranks.endpoints,
            )
            await self._ranks.open_reservation(offer, reserved.block_ids)
            self._reservations[offer.reservation_id] = reservation
            await context.write(worker_pb2.DecodeEvent(reserved=wire.reservation_to_wire(offer)))
            await _committed(reservation, stream)
            await _relay(stream, context)
        finally:
            await self._leases.clean_up(self._end(stream, reservation))

    async def _commit(self, message: pb.CommitRequest, reservation: _Reservation) -> None:
        first = message.first_token
        if len(first.token_ids) != 1 or first.finish_reason:
            raise InvalidArgumentError(
                f"a commit brings one token of a sequence that goes on, got {len(first.token_ids)}",
                field="first_token",
            )
        provenance = wire.provenance_from_wire(message.provenance)
        await self._ranks.verify_reservation(reservation.reservation_id, provenance)
        await self._ranks.close_reservation(reservation.reservation_id)
        reservation.is_closed = True
        # The stream may have ended meanwhile, and another attempt of the same request may hold a reservation now:
        # what was verified is this one. While it is registered, its cleanup has not sent its abort to the engine.
        if self._reservations.pop(reservation.reservation_id, None) is None:
            raise NotFoundError("the request has ended")
        await self._engine.commit(reservation.request.request_id, first.token_ids[0])

    async def _end(self, stream: RequestStream, reservation: _Reservation | None) -> None:
        """Free what the request holds, its blocks last."""
        if reservation is not None:
            self._reservations.pop(reservation.reservation_id, None)
            if not reservation.is_closed:
                await self._close(reservation)
        await self._engine.close_stream(stream)

    async def _close(self, reservation: _Reservation) -> None:
        try:
            await self._ranks.close_reservation(reservation.reservation_id)
        except FuselineError as error:
            # A rank that does not answer may still write: no block of this engine may be used again.
            self._engine.fail(UnavailableError(f"a reservation could not be closed on every rank: {error.message}"))


async def _committed(reservation: _Reservation, stream: RequestStream) -> None:
    """Wait for the commit, for what ends the reservation instead, or for the engine to end the request."""
    try:
        await stream.unless_failed(reservation.outcome)
    except DeadlineExceededError:
        deadline = reservation.request.deadline
        if deadline is None or time.monotonic() < deadline:  # it was the limit on handoffs, not the caller's deadline
            raise UnavailableError("the KV was not handed over in time") from None
        raise


async def _relay(stream: RequestStream, context: Context) -> None:
    """Outputs until the end; what a slow client has not read yet comes as one."""
    while True:
        output = await stream.get()
        await context.write(worker_pb2.DecodeEvent(output=wire.output_to_wire(output)))
        if output.finish_reason is not None:
            return
