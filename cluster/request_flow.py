"""One sequence's way over the cluster: reserve, prefill, hand off, decode; again on other workers when that fails.

::

    gateway                      decode worker              prefill worker
      | Decode(sequence) ------------> reserve blocks
      | <-------------------- reserved
      | Prefill(sequence, reservation) -------------------------> compute the prompt
      | <------------------------------------------- first token
      |                              take KV <------------------ push layer by layer
      |                              verify, admit <------------ commit, with the first token
      | <------------- second token, ...

The two open streams are the sequence's lease: whatever ends ``outputs`` (an end, an error, a cancellation) cancels
both, and the workers free what they hold. Until decode has given something nothing is lost by starting over: the next
attempt has another epoch, so that late KV of this one is refused, and samples the same first token, which is not
given out twice. Only when it then falls to decode to compute the prompt, and the pools differ in their parallelism,
may the first token be another one; the sequence then ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import grpc
import grpc.aio

from ..proto.fuseline.v1 import common_pb2, worker_pb2
from ..runtime.errors import (
    AlreadyExistsError,
    CancelledError,
    DeadlineExceededError,
    ErrorCode,
    FuselineError,
    InternalError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
    make_error,
)
from ..runtime.request import Request
from ..workers import wire
from ..workers.grpc_errors import error_from_rpc, is_being_cancelled
from .dispatcher import Dispatcher, WaitedTooLongError
from .router import RoutingQuery
from .worker_pool import Assignment

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
# Most that a sequence waits for room, over all attempts; those in a hurry have a deadline.
MAX_WAIT_S = 600.0
# A worker may see the user's deadline pass this much before the gateway does.
DEADLINE_SLACK_S = 0.1
# Another attempt may succeed where these happened: the worker is gone, or the KV did not arrive as it was sent.
_RETRYABLE = frozenset({ErrorCode.UNAVAILABLE, ErrorCode.DATA_LOSS, ErrorCode.RESOURCE_EXHAUSTED})

Clock = Callable[[], float]


@dataclass(slots=True)
class FlowRecord:
    """What happened to a sequence on its way; the summary is made of it.

    Attributes:
        routed_at: on the gateway's clock; of the first attempt.
        prefill_worker: of the last attempt; empty for local prefill.
    """

    routed_at: float | None = None
    prefill_worker: str = ""
    decode_worker: str = ""
    num_retries: int = 0


class _LegError(Exception):
    """A leg failed: which worker's it was and how."""

    def __init__(self, worker_id: str, error: FuselineError) -> None:
        super().__init__(error.message)
        self.worker_id = worker_id
        self.error = error


class _RefusedError(Exception):
    """The decode worker has no room, whatever its snapshot said."""


class _Leg:
    """One of the two open streams, with at most one read under way."""

    def __init__(self, worker_id: str, call: Any) -> None:
        self.worker_id = worker_id
        self._call = call
        self._events: AsyncIterator[Any] = aiter(call)
        self._reading: asyncio.Task[Any] | None = None

    def reading(self) -> asyncio.Task[Any]:
        """The read of the next event, begun if need be; ``next`` gives its result."""
        if self._reading is None:
            self._reading = asyncio.ensure_future(anext(self._events))
        return self._reading

    async def next(self) -> Any:
        """The next event.

        Raises:
            _LegError: the stream failed or ended.
        """
        try:
            event = await (self._reading or anext(self._events))
        except grpc.RpcError as error:
            raise _LegError(self.worker_id, self._typed(error)) from None
        except asyncio.CancelledError:
            if is_being_cancelled():
                raise
            lost = UnavailableError(f"the connection to worker {self.worker_id} was closed", worker_id=self.worker_id)
            raise _LegError(self.worker_id, lost) from None
        except StopAsyncIteration:
            early = UnavailableError(f"worker {self.worker_id} ended the stream early", worker_id=self.worker_id)
            raise _LegError(self.worker_id, early) from None
        self._reading = None
        return event

    def _typed(self, error: grpc.RpcError) -> FuselineError:
        """The error of a call that was not cancelled here, as far as it is the user's.

        A worker that stops may answer that it was. What a worker does not find, or has already, are names that the
        gateway gives: a reservation that ended on the other leg, an earlier attempt that is still being cleaned up.
        """
        typed = error_from_rpc(error)
        if isinstance(typed, CancelledError | NotFoundError | AlreadyExistsError):
            typed = make_error(ErrorCode.UNAVAILABLE, typed.message, {"cause": typed.code.value, **typed.details})
        if isinstance(typed, UnavailableError) and not typed.details:  # gRPC's word, not the worker's
            typed = UnavailableError(f"worker {self.worker_id} was lost: {typed.message}")
        typed.details.setdefault("worker_id", self.worker_id)
        return typed

    def cancel(self) -> None:
        """End the stream, and with it what the worker holds for it; nothing happens when it is over."""
        self._call.cancel()
        if self._reading is not None:
            self._reading.add_done_callback(lambda task: task.cancelled() or task.exception())


class SequenceFlow:
    """Runs one sequence. Use ``outputs`` once, and close it.

    Args:
        request: with its deadline, if any, on ``clock``.
        prefix_keys: see ``RoutingQuery``.
        record: written as things happen.
    """

    def __init__(
        self, request: Request, prefix_keys: tuple[int, ...], dispatcher: Dispatcher, record: FlowRecord, clock: Clock
    ) -> None:
        self._request = request
        self._query = RoutingQuery(len(request.prompt_token_ids), request.params.max_tokens, prefix_keys)
        self._dispatcher = dispatcher
        self._record = record
        self._clock = clock
        self._message = wire.request_to_wire(request)
        self._wait_until: float | None = None
        self._first: tuple[int, ...] | None = None  # the first token, once it is given out
        self._started = False  # the decode stream has given something

    async def outputs(self) -> AsyncGenerator[common_pb2.SequenceOutput]:
        """The sequence's outputs as the workers sent them; the last one has finish reason STOP or LENGTH.

        Raises:
            FuselineError: the sequence failed, was refused, or its deadline passed; nothing is held anywhere.
        """
        epoch = 0
        while True:
            assignment = await self._assigned()
            self._note(assignment, epoch)
            try:
                async with aclosing(self._attempt(assignment, epoch)) as attempt:
                    async for output in attempt:
                        yield output
                return
            except _RefusedError:
                assignment.refused()
            except _LegError as failed:
                epoch += 1
                error = self._judged(failed)
                if self._started or error.code not in _RETRYABLE or epoch == MAX_ATTEMPTS:
                    raise error from None
                logger.warning("%s is tried again: worker %s: %s", self._request.request_id, failed.worker_id, error)
                known = self._query.failed_workers
                self._query = replace(self._query, failed_workers=known | {failed.worker_id})
            finally:
                assignment.release()

    async def _assigned(self) -> Assignment:
        """Workers for the next attempt, before the deadline."""
        now = self._clock()
        if self._wait_until is None:
            self._wait_until = now + MAX_WAIT_S
        patience = max(0.0, self._wait_until - now)
        time_left = self._time_left()
        if time_left is None or patience <= time_left:
            return await self._dispatcher.dispatch(self._query, self._request.priority, patience)
        try:
            return await self._dispatcher.dispatch(self._query, self._request.priority, time_left)
        except WaitedTooLongError:
            raise DeadlineExceededError("the deadline passed while the request waited for room") from None

    def _note(self, assignment: Assignment, epoch: int) -> None:
        record, decision = self._record, assignment.decision
        if record.routed_at is None:
            record.routed_at = self._clock()
        record.prefill_worker = decision.prefill_worker or ""
        record.decode_worker = decision.decode_worker
        record.num_retries = epoch
        self._message.epoch = epoch

    async def _attempt(self, assignment: Assignment, epoch: int) -> AsyncGenerator[common_pb2.SequenceOutput]:
        """One try.

        Raises:
            _LegError: a leg failed.
            _RefusedError: no room for the reservation.
        """
        decision = assignment.decision
        local = decision.prefill_worker is None
        decode = _Leg(
            decision.decode_worker,
            assignment.decode.Decode(
                worker_pb2.DecodeRequest(sequence=self._message, local_prefill=local), timeout=self._time_left()
            ),
        )
        legs = [decode]
        try:
            if not local:
                reservation = await self._reserved(decode)
                assignment.reserved()
                prefill = _Leg(
                    decision.prefill_worker or "",
                    assignment.prefill.Prefill(
                        worker_pb2.PrefillRequest(sequence=self._message, reservation=reservation),
                        timeout=self._time_left(),
                    ),
                )
                legs.append(prefill)
                first = await _first_token(prefill, decode)
                assignment.prefilled()
                if (unsent := self._unsent(first)) is not None:
                    yield unsent
                if first.finish_reason:
                    return
                await _handed_over(prefill, decode)
            has_begun = False
            while True:
                event = await decode.next()
                output: common_pb2.SequenceOutput | None = event.output
                if not has_begun:
                    has_begun = True
                    assignment.prefilled()
                    assignment.decoding()
                    output = self._unsent(event.output, by_decode=True) if local else output
                if output is not None:
                    self._started = True
                    yield output
                if event.output.finish_reason:
                    return
        finally:
            for leg in legs:
                leg.cancel()

    async def _reserved(self, decode: _Leg) -> worker_pb2.KvReservation:
        try:
            event = await decode.next()
        except _LegError as failed:
            if isinstance(failed.error, ResourceExhaustedError):
                raise _RefusedError from None
            raise
        if event.WhichOneof("event") != "reserved":
            raise _LegError(decode.worker_id, InternalError("the decode worker answered without a reservation"))
        reservation: worker_pb2.KvReservation = event.reserved
        return reservation

    def _judged(self, failed: _LegError) -> FuselineError:
        """The error to go by: a deadline that is not the user's is the workers' own, for a handoff that got stuck."""
        time_left = self._time_left()
        if isinstance(failed.error, DeadlineExceededError) and (time_left is None or time_left > DEADLINE_SLACK_S):
            return UnavailableError(
                f"worker {failed.worker_id} gave up waiting for the handoff", worker_id=failed.worker_id
            )
        return failed.error

    def _unsent(
        self, output: common_pb2.SequenceOutput, *, by_decode: bool = False
    ) -> common_pb2.SequenceOutput | None:
        """Of the output that a try begins with, what no earlier one has given out; None if that is nothing.

        Raises:
            InternalError: it begins with another token, so that the text given out is no prefix of the answer;
                UnavailableError if the decode worker computed it, whose sums may have other parts.
        """
        first = tuple(output.token_ids[:1])
        if not first:
            return output
        if self._first is None:
            self._first = first
            return output
        if self._first != first:
            told = f"the first token was {self._first}, a retry sampled {first}"
            raise UnavailableError(told) if by_decode else InternalError(told)
        rest = common_pb2.SequenceOutput()
        rest.CopyFrom(output)
        del rest.token_ids[:1]
        del rest.logprobs[:1]
        rest.ClearField("prompt_logprobs")
        return rest if rest.token_ids or rest.finish_reason else None

    def _time_left(self) -> float | None:
        deadline = self._request.deadline
        return None if deadline is None else max(0.0, deadline - self._clock())


async def _first_token(prefill: _Leg, decode: _Leg) -> common_pb2.SequenceOutput:
    """The prefill worker's token, unless either leg fails before."""
    await asyncio.wait({prefill.reading(), decode.reading()}, return_when=asyncio.FIRST_COMPLETED)
    if _failed(decode.reading()) and (not prefill.reading().done() or _failed(prefill.reading())):
        await decode.next()  # first, since prefill fails where decode has
    event = await prefill.next()
    if event.WhichOneof("event") != "first_token":
        raise _LegError(prefill.worker_id, InternalError("the prefill worker answered without a first token"))
    first: common_pb2.SequenceOutput = event.first_token
    return first


async def _handed_over(prefill: _Leg, decode: _Leg) -> None:
    """Wait for the decode worker to show that it goes on, unless either leg fails before.

    The decode worker's first output is the proof. That the prefill worker reports the handoff, before or after, is
    not needed, and its stream may end then.
    """
    await asyncio.wait({prefill.reading(), decode.reading()}, return_when=asyncio.FIRST_COMPLETED)
    if not decode.reading().done():
        await prefill.next()


def _failed(reading: asyncio.Task[Any]) -> bool:
    return reading.done() and (reading.cancelled() or reading.exception() is not None)
