"""The prefill side of a request: compute the prompt and one token, push the KV meanwhile, commit it to decode.

::

    Prefill -> ranks start_handoff -> engine computes, ranks push each layer as it is done
            -> first token, to the gateway at once
            -> ranks finish_handoff: every piece is acknowledged -> Commit to decode -> "handed_off"

Every way out runs the same cleanup: no rank may read the blocks for sending any more (cancel on all of them), then
the engine frees the blocks, and a decode worker that would wait in vain is told so.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from ...proto.fuseline.v1 import kv_transfer_pb2, kv_transfer_pb2_grpc, worker_pb2, worker_pb2_grpc
from ...runtime.config import ModelInfo
from ...runtime.errors import DeadlineExceededError, FuselineError, ProvenanceError, UnavailableError
from ...runtime.handoff import KvReservation
from ...runtime.request import Phase, Request, SequenceOutput
from .. import wire
from ..engine_thread import EngineThread
from ..grpc_errors import answering, error_from_rpc
from ..request_stream import RequestStream
from .channels import ChannelCache
from .leases import Leases, deadline_of
from .ranks import RankCalls, provenance_of

COMMIT_TIMEOUT_S = 30.0
ABORT_TIMEOUT_S = 1.0

Context = grpc.aio.ServicerContext[Any, Any]
logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Handoff:
    """A reservation that this worker fills.

    Attributes:
        is_sending: ranks may read the blocks for it.
        is_wanted: the decode worker waits for it, or believes so.
    """

    reservation: KvReservation
    is_sending: bool = False
    is_wanted: bool = True


class PrefillServicer(worker_pb2_grpc.PrefillServiceServicer):
    """``PrefillService``."""

    def __init__(
        self, engine: EngineThread, ranks: RankCalls, leases: Leases, model: ModelInfo, channels: ChannelCache
    ) -> None:
        self._engine = engine
        self._ranks = ranks
        self._leases = leases
        self._model = model
        self._channels = channels

    async def Prefill(self, message: worker_pb2.PrefillRequest, context: Context) -> None:
        """See worker.proto. A stream ends well after a first token that ends the sequence, or after ``handed_off``
        (after the first token when there is no reservation); every other end is a status.
        """
        async with answering(context):
            with self._leases.hold():
                request = wire.request_from_wire(message.sequence, Phase.PREFILL, deadline_of(context))
                handoff = None
                if message.HasField("reservation"):
                    handoff = _Handoff(wire.reservation_from_wire(message.reservation))
                stream: RequestStream | None = None
                try:
                    self._check_provenance(request, handoff)
                    stream = await self._engine.open_stream(request.request_id)
                    await self._prefill(request, stream, handoff, context)
                except ProvenanceError:
                    self._leases.num_provenance_failures += 1
                    raise
                finally:
                    await self._leases.clean_up(self._end(stream, handoff))

    def _check_provenance(self, request: Request, handoff: _Handoff | None) -> None:
        """What decode reserved for must be what this worker is about to compute."""
        if handoff is None:
            return
        wanted = handoff.reservation.provenance
        if wanted != provenance_of(request, self._model):
            raise ProvenanceError(
                "the reservation is for another request, attempt, prompt or model", request_id=wanted.request_id
            )

    async def _prefill(
        self, request: Request, stream: RequestStream, handoff: _Handoff | None, context: Context
    ) -> None:
        if handoff is not None:
            handoff.is_sending = True
            await self._ranks.start_handoff(request.request_id, handoff.reservation)
        await self._engine.add(request)
        first = await stream.get()
        await context.write(worker_pb2.PrefillEvent(first_token=wire.output_to_wire(first)))
        if handoff is None:
            return
        if first.finish_reason is not None:
            handoff.is_wanted = False  # the gateway ends the decode stream
            return
        try:
            handed_off = await stream.unless_failed(self._hand_off(request, first, handoff))
        except DeadlineExceededError:
            if request.deadline is None or time.monotonic() < request.deadline:  # it was the limit on handoffs
                raise UnavailableError("the KV was not taken in time") from None
            raise
        await context.write(worker_pb2.PrefillEvent(handed_off=handed_off))

    async def _hand_off(self, request: Request, first: SequenceOutput, handoff: _Handoff) -> worker_pb2.HandedOff:
        """Send what is left, then let decode start.

        Raises:
            UnavailableError: the decode side is gone, or gave the reservation up.
            ProvenanceError: it does not take the KV for what it wants.
        """
        summary = await self._ranks.finish_handoff(request.request_id)
        handoff.is_sending = False
        start = time.monotonic()
        message = kv_transfer_pb2.CommitRequest(
            reservation_id=handoff.reservation.reservation_id,
            provenance=wire.provenance_to_wire(provenance_of(request, self._model)),
            first_token=wire.output_to_wire(first),
        )
        try:
            await self._decode_worker(handoff).Commit(message, timeout=_time_left(request, COMMIT_TIMEOUT_S))
        except grpc.RpcError as error:
            raise error_from_rpc(error) from None
        handoff.is_wanted = False
        return worker_pb2.HandedOff(
            num_bytes=summary.num_bytes,
            transfer_s=summary.transfer_s + time.monotonic() - start,
            transport=summary.transport,
        )

    async def _end(self, stream: RequestStream | None, handoff: _Handoff | None) -> None:
        """Free what the request holds, its blocks last; then tell a decode worker that would wait in vain."""
        if stream is not None:
            if handoff is not None and handoff.is_sending:
                await self._cancel(stream)
            await self._engine.close_stream(stream)
        if handoff is not None and handoff.is_wanted:
            await self._abort(handoff)

    async def _cancel(self, stream: RequestStream) -> None:
        try:
            await self._ranks.cancel_handoff(stream.request_id)
        except FuselineError as error:
            # A rank that does not answer may still read: no block of this engine may be used again.
            self._engine.fail(UnavailableError(f"a handoff could not be cancelled on all ranks: {error.message}"))

    async def _abort(self, handoff: _Handoff) -> None:
        message = kv_transfer_pb2.AbortRequest(
            reservation_id=handoff.reservation.reservation_id, reason="the prefill did not come to its end"
        )
        try:
            await self._decode_worker(handoff).Abort(message, timeout=ABORT_TIMEOUT_S)
        except grpc.RpcError as error:  # it is gone, or will notice by its own limits
            logger.info("a decode worker could not be told of a failed handoff: %s", error_from_rpc(error))

    def _decode_worker(self, handoff: _Handoff) -> kv_transfer_pb2_grpc.KvTransferStub:
        channel = self._channels.get(handoff.reservation.endpoints[0].address)
        return kv_transfer_pb2_grpc.KvTransferStub(channel)


def _time_left(request: Request, limit_s: float) -> float:
    if request.deadline is None:
        return limit_s
    return max(0.0, min(limit_s, request.deadline - time.monotonic()))
