"""What one request has produced and nobody has read yet. Lives on the event loop; not thread-safe."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import TypeVar

from ..runtime.errors import ErrorCode, FuselineError, InternalError, make_error
from ..runtime.request import FinishReason, SequenceOutput

T = TypeVar("T")


class RequestStream:
    """Outputs of one request, from the engine to one reader.

    A slow reader costs no more than the tokens it has not read: outputs that wait are handed over as one. So the
    stream is bounded by the request's max_tokens, and nothing ever waits for a reader.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.closed = asyncio.Event()
        self._waiting: list[SequenceOutput] = []
        self._ready = asyncio.Event()
        self._failed = asyncio.Event()
        self._ended = False

    def put(self, output: SequenceOutput) -> None:
        """Append an output; whatever comes after the one with a finish reason is dropped."""
        if self._ended:
            return
        self._ended = output.finish_reason is not None
        self._waiting.append(output)
        self._ready.set()
        if failure_of(output) is not None:
            self._failed.set()

    async def get(self) -> SequenceOutput:
        """Everything since the last call, as one output with at least one token, or the end.

        Raises:
            FuselineError: the request ended otherwise than by STOP or LENGTH; also on every later call.
        """
        await self._ready.wait()
        waiting, self._waiting = self._waiting, []
        if not waiting:
            raise InternalError(f"request {self.request_id!r} was read past its end")
        last = waiting[-1]
        failure = failure_of(last)
        if failure is not None:
            self._waiting = [last]
            raise failure
        if last.finish_reason is None:
            self._ready.clear()
        return merge_outputs(waiting)

    async def unless_failed(self, work: Awaitable[T]) -> T:
        """What ``work`` gives, unless the request fails before; then ``work`` is cancelled. Takes no output.

        Raises:
            FuselineError: the request's failure, or that of ``work``.
        """
        working = asyncio.ensure_future(work)
        failing = asyncio.ensure_future(self._failed.wait())
        try:
            await asyncio.wait({working, failing}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                await self.get()
            return working.result()
        finally:
            working.cancel()
            failing.cancel()


def merge_outputs(outputs: Sequence[SequenceOutput]) -> SequenceOutput:
    """One output that says what several of the same request said, in order; at least one is needed."""
    if len(outputs) == 1:
        return outputs[0]
    last = outputs[-1]
    prompt_logprobs = [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None]
    return SequenceOutput(
        request_id=last.request_id,
        token_ids=tuple(token for output in outputs for token in output.token_ids),
        logprobs=tuple(entry for output in outputs for entry in output.logprobs),
        prompt_logprobs=prompt_logprobs[0] if prompt_logprobs else None,
        num_cached_tokens=max(output.num_cached_tokens for output in outputs),
        finish_reason=last.finish_reason,
        error_code=last.error_code,
        error=last.error,
    )


def failure_of(output: SequenceOutput) -> FuselineError | None:
    """The error that an end stands for: none for STOP and LENGTH, and none while the sequence goes on."""
    match output.finish_reason:
        case None | FinishReason.STOP | FinishReason.LENGTH:
            return None
        case FinishReason.ABORT:
            return make_error(ErrorCode.CANCELLED, output.error or f"request {output.request_id!r} was aborted")
        case FinishReason.DEADLINE:
            message = output.error or f"the deadline of request {output.request_id!r} passed"
            return make_error(ErrorCode.DEADLINE_EXCEEDED, message)
        case FinishReason.ERROR:
            return make_error(output.error_code or ErrorCode.INTERNAL, output.error or "the engine failed")
