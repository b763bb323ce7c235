"""The ``Inference`` service: from a validated request to a stream of text.

A request's sequences run side by side and write to one stream. A write waits while the client is slow; then nothing
is read from the workers either, which keep what is unread as tokens: back-pressure costs no memory here. The request
ends as a whole: the first sequence to fail, the client's leaving or the deadline end all others, on every leg.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc
import grpc.aio

from ..proto.fuseline.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from ..runtime.config import ModelInfo
from ..runtime.errors import CancelledError, DeadlineExceededError, FuselineError
from ..runtime.request import FinishReason
from ..workers import wire
from ..workers.grpc_errors import answering
from ..workers.tokenizer import OutputText, Tokenizer
from .admission import Admission, AdmittedRequest
from .dispatcher import Dispatcher
from .request_flow import FlowRecord, SequenceFlow

Writer = Callable[[inference_pb2.GenerateResponse], Awaitable[None]]
Context: TypeAlias = "grpc.aio.ServicerContext[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]"
# From this many prompt tokens on, the first of n sequences goes ahead, so that the others find its prompt cached.
MIN_SHARED_PROMPT_TOKENS = 64


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Serves users.

    Attributes:
        finished: sequences by how they ended; each admitted one is counted exactly once.
    """

    def __init__(
        self,
        model: ModelInfo,
        tokenizer: Tokenizer,
        admission: Admission,
        dispatcher: Dispatcher,
        version: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.finished: Counter[FinishReason] = Counter()
        self._model = model
        self._tokenizer = tokenizer
        self._admission = admission
        self._dispatcher = dispatcher
        self._version = version
        self._clock = clock

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Context) -> None:
        """See inference.proto."""
        async with answering(context):
            now, time_left = self._clock(), context.time_remaining()
            deadline = None if time_left is None else now + time_left
            async with self._admission.admit(request, now, deadline) as admitted:
                await self._run(admitted, context)

    async def GetModelInfo(
        self, request: inference_pb2.GetModelInfoRequest, context: Any
    ) -> inference_pb2.GetModelInfoResponse:
        """See inference.proto."""
        model, shape = self._model, self._model.shape
        return inference_pb2.GetModelInfoResponse(
            model=model.name,
            fingerprint=model.fingerprint,
            dtype=model.dtype,
            max_model_len=model.max_model_len,
            vocab_size=shape.vocab_size,
            eos_token_ids=model.eos_token_ids,
            num_layers=shape.num_layers,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            hidden_size=shape.hidden_size,
            version=self._version,
        )

    async def _run(self, admitted: AdmittedRequest, context: Context) -> None:
        """Run all sequences to their end.

        Raises:
            FuselineError: one of them failed; none is left.
        """
        writing = asyncio.Lock()

        async def write(response: inference_pb2.GenerateResponse) -> None:
            async with writing:
                try:
                    await context.write(response)
                except grpc.aio.InternalError:  # so gRPC says that the call is over; the cancellation is on its way
                    raise CancelledError("the client has gone") from None

        go_ahead = asyncio.Event()
        if admitted.num_prompt_tokens < MIN_SHARED_PROMPT_TOKENS or not admitted.prefix_keys:
            go_ahead.set()
        # A task that is cancelled before it ever ran ends like this, too.
        ended = [FinishReason.ABORT] * len(admitted.sequences)

        async def run(index: int) -> None:
            if index:
                await go_ahead.wait()
            try:
                ended[index] = await self._stream(admitted, index, write, go_ahead)
            except (FuselineError, asyncio.CancelledError) as error:
                ended[index] = self._end_of(error, admitted.sequences[index].deadline)
                raise

        try:
            async with asyncio.TaskGroup() as group:
                for index in range(len(admitted.sequences)):
                    group.create_task(run(index))
        except* FuselineError as failures:
            raise _first(failures) from None
        finally:
            self.finished.update(ended)

    def _end_of(self, error: BaseException, deadline: float | None) -> FinishReason:
        """How a sequence ended that did not end well. A deadline that passes shows as a cancellation, too."""
        if isinstance(error, FuselineError) and not isinstance(error, CancelledError | DeadlineExceededError):
            return FinishReason.ERROR
        late = deadline is not None and self._clock() >= deadline
        return FinishReason.DEADLINE if late or isinstance(error, DeadlineExceededError) else FinishReason.ABORT

    async def _stream(
        self, admitted: AdmittedRequest, index: int, write: Writer, go_ahead: asyncio.Event
    ) -> FinishReason:
        record = FlowRecord()
        flow = SequenceFlow(admitted.sequences[index], admitted.prefix_keys, self._dispatcher, record, self._clock)
        answer = _Answer(admitted, index, OutputText(self._tokenizer, admitted.params), record, self._clock)
        async with aclosing(flow.outputs()) as outputs:
            async for output in outputs:
                response = answer.add(output)
                go_ahead.set()
                if response.finish_reason:
                    break
                await write(response)
        # The workers are free of the sequence by now, however slow the client is to take the end of it.
        await write(response)
        return answer.finish_reason


class _Answer:
    """What the client is told of one sequence."""

    def __init__(
        self, admitted: AdmittedRequest, index: int, text: OutputText, record: FlowRecord, clock: Callable[[], float]
    ) -> None:
        self.finish_reason = FinishReason.ERROR
        self._admitted = admitted
        self._index = index
        self._text = text
        self._record = record
        self._clock = clock
        self._first_at: float | None = None
        self._num_tokens = 0
        self._num_cached_tokens = 0

    def add(self, output: common_pb2.SequenceOutput) -> inference_pb2.GenerateResponse:
        """The response for one output; the last one, which a stop string may bring early, has a summary."""
        now = self._clock()
        if self._first_at is None:
            self._first_at = now
            self._num_cached_tokens = output.num_cached_tokens
        piece = self._text.add(output.token_ids, wire.finish_reason_from_wire(output.finish_reason))
        self._num_tokens += piece.num_tokens
        response = inference_pb2.GenerateResponse(
            request_id=self._admitted.request_id,
            index=self._index,
            text=piece.text,
            token_ids=output.token_ids[: piece.num_tokens],
            logprobs=output.logprobs[: piece.num_tokens],
            prompt_logprobs=output.prompt_logprobs,
        )
        if piece.finish_reason is not None:
            self.finish_reason = piece.finish_reason
            response.finish_reason = wire.finish_reason_to_wire(piece.finish_reason)
            stop_reason = "" if piece.stop_reason is None else str(piece.stop_reason)
            response.summary.CopyFrom(self._summary(self._first_at, now, stop_reason))
        return response

    def _summary(self, first_at: float, now: float, stop_reason: str) -> inference_pb2.GenerateSummary:
        record, arrived_at = self._record, self._admitted.arrived_at
        routed_at = first_at if record.routed_at is None else record.routed_at
        return inference_pb2.GenerateSummary(
            num_prompt_tokens=self._admitted.num_prompt_tokens,
            num_output_tokens=self._num_tokens,
            num_cached_tokens=self._num_cached_tokens,
            queue_s=routed_at - arrived_at,
            ttft_s=first_at - arrived_at,
            tpot_s=(now - first_at) / (self._num_tokens - 1) if self._num_tokens > 1 else 0.0,
            e2e_s=now - arrived_at,
            prefill_worker=record.prefill_worker,
            decode_worker=record.decode_worker,
            num_retries=record.num_retries,
            stop_reason=stop_reason,
        )


def _first(failures: BaseExceptionGroup[FuselineError]) -> FuselineError:
    """The first error of a group: the one that ended the others."""
    for failure in failures.exceptions:
        return _first(failure) if isinstance(failure, BaseExceptionGroup) else failure
    raise ValueError("an exception group is never empty")
