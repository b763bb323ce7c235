"""The loop of one group: requests in, steps to the executor, outputs out.

Single-threaded and without I/O of its own: whoever owns it calls ``step`` while there is work, and everything else
between two steps. Errors of the group do not escape from ``step``: every request then ends with FinishReason.ERROR
and ``failure`` says why.

Handoffs. On a prefill engine a Phase.PREFILL request delivers one token and, unless that ended it, keeps its blocks
until ``release_handoff``. On a decode engine ``reserve`` takes blocks and ``commit`` starts decoding. When one of
these waits too long it ends with FinishReason.DEADLINE, but its blocks are kept still, since a transfer may be
reading or writing them: the owner stops the transfer, then calls ``release_handoff`` or ``abort``. These two free
blocks at once, so the transfer must have been stopped before they are called.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from .config import EngineConfig
from .engine_stats import EngineStats, Reserved
from .errors import (
    AlreadyExistsError,
    ErrorCode,
    FuselineError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from .expirations import Expirations
from .plan import NO_TOKEN, Executor, StepResult
from .request import FinishReason, Phase, Request, SequenceOutput
from .request_check import check_request, max_total_tokens
from .scheduled_step import Chunk, ScheduledStep
from .scheduler import Scheduler
from .sequence import Sequence, SequenceState
from .sequence_store import SequenceStore

_IN_HANDOFF = frozenset({SequenceState.RESERVED, SequenceState.HELD})


class Engine:
    """Continuous batching over one executor.

    Args:
        config: of model, cache and limits.
        executor: runs the steps; used by this engine only.
        clock: seconds; never goes back.

    Attributes:
        failure: why the executor is unusable, or None. It stays so: make a new engine.
    """

    def __init__(self, config: EngineConfig, executor: Executor, clock: Callable[[], float]) -> None:
        self.config = config
        self.failure: FuselineError | None = None
        self._executor = executor
        self._clock = clock
        self._store = SequenceStore(config)
        self._scheduler = Scheduler(config, self._store)
        self._depth = config.parallel.pipeline_parallel_size
        self._max_total_tokens = max_total_tokens(config)
        self._eos_token_ids = frozenset(config.model.eos_token_ids)
        self._is_eos = np.zeros(config.model.shape.vocab_size, np.bool_)
        self._is_eos[list(config.model.eos_token_ids)] = True
        self._in_flight: deque[ScheduledStep] = deque()
        self._expirations = Expirations()
        self._num_arrivals = 0
        self._num_finished = 0
        self._num_generated_tokens = 0
        self._is_idle = False

    # -- requests ------------------------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Queue a FULL or PREFILL request. ``max_tokens`` is cut to what model and pool can hold.

        Raises:
            InvalidArgumentError: a token id is not in the vocabulary, the prompt leaves no room for an output, or the
                phase is DECODE.
            AlreadyExistsError: a live request has this id.
            ResourceExhaustedError: the queue is full, or the whole pool is too small for the prompt.
            UnavailableError: the group has failed.
        """
        if request.phase is Phase.DECODE:
            raise InvalidArgumentError("a decode request is admitted by reserve and commit", field="phase")
        self._check(request)
        limit = self.config.scheduler.max_num_queued
        if len(self._store.waiting) >= limit:
            raise ResourceExhaustedError(
                f"{limit} requests are waiting, which is the limit", field="max_num_queued", value=limit, limit=limit
            )
        seq = self._new_sequence(request)
        self._store.add_waiting(seq)
        self._expire_at(seq, request.deadline)

    def reserve(self, request: Request) -> Reserved:
        """Take blocks for a DECODE request's prompt and one token; ``commit`` or ``abort`` must follow.

        Raises:
            ResourceExhaustedError: they are not free now, or running and waiting requests need them.
            InvalidArgumentError, AlreadyExistsError, UnavailableError: as for ``add_request``.
        """
        if request.phase is not Phase.DECODE:
            raise InvalidArgumentError(f"a {request.phase} request takes no reservation", field="phase")
        self._check(request)
        seq = self._new_sequence(request)
        self._scheduler.reserve(seq)
        self._expire_at(seq, self._handoff_limit(request))
        return Reserved(seq.num_cached_tokens, tuple(seq.block_ids))

    def commit(self, request_id: str, first_token_id: int) -> SequenceOutput | None:
        """The prompt's KV is complete and verified in the reserved blocks: decode from here.

        The first token counts as output (limits, stop ids, penalties) but is the prefill engine's to deliver.

        Returns:
            The final output, without tokens, when the first token ends the sequence; else None.

        Raises:
            NotFoundError: there is no such reservation (any more).
            InvalidArgumentError: the token is not in the vocabulary.
        """
        seq = self._store.sequences.get(request_id)
        if seq is None or seq.state is not SequenceState.RESERVED:
            raise NotFoundError(f"there is no reservation for request {request_id!r}", field="request_id")
        if not 0 <= first_token_id < len(self._is_eos):
            raise InvalidArgumentError(
                f"token id {first_token_id} is not in the vocabulary of {len(self._is_eos)}",
                field="first_token_id",
                value=first_token_id,
                limit=len(self._is_eos),
            )
        seq.num_computed_tokens = seq.num_prompt_tokens
        self._store.cache.register(seq, seq.num_prompt_tokens)
        seq.token_ids.append(first_token_id)
        reason = seq.finish_reason()
        if reason is not None:
            return self._finish(seq, reason)
        self._store.commit(seq)
        self._expire_at(seq, seq.request.deadline)
        self._is_idle = False
        return None

    def release_handoff(self, request_id: str) -> None:
        """The KV of a held prefill has been taken over, or an expired handoff's transfer is stopped: free its blocks.

        Does nothing when there is no such handoff (any more).
        """
        seq = self._store.sequences.get(request_id)
        if seq is None or seq.state not in (SequenceState.HELD, SequenceState.EXPIRED):
            return
        if seq.state is SequenceState.HELD:
            self._num_finished += 1
        self._drop(seq)

    def abort(
        self,
        request_id: str,
        reason: FinishReason = FinishReason.ABORT,
        error_code: ErrorCode | None = None,
        error: str = "",
    ) -> SequenceOutput | None:
        """End a request wherever it is; also how a front end ends one at a stop string, with FinishReason.STOP.

        Returns:
            The final output, or None when the request had ended already or never was.
        """
        seq = self._store.sequences.get(request_id)
        if seq is None:
            return None
        if seq.state is SequenceState.EXPIRED:
            self._drop(seq)
            return None
        return self._finish(seq, reason, error_code, error)

    # -- the loop ------------------------------------------------------------------------------------------------

    def step(self) -> list[SequenceOutput]:
        """Expire deadlines, keep the pipeline full, and take up the result of the oldest step in flight."""
        outputs = self._expire()
        if self.failure is not None:
            return outputs
        try:
            while len(self._in_flight) < self._depth and (scheduled := self._scheduler.schedule()) is not None:
                self._in_flight.append(scheduled)
                self._executor.submit(scheduled.plan)
            self._is_idle = not self._in_flight
            if self._in_flight:
                result = self._executor.collect()
                step = self._in_flight.popleft()
                self._check_result(step, result)
                self._take_up(step, result, outputs)
                self._scheduler.collected(step)
        except FuselineError as error:
            outputs += self.fail(error)
        return outputs

    def fail(self, error: FuselineError) -> list[SequenceOutput]:
        """The executor is unusable: end every request with FinishReason.ERROR, and refuse new ones."""
        self.failure = error
        self._in_flight.clear()
        self._store.forget_steps()
        outputs = []
        for seq in list(self._store.sequences.values()):
            output = self.abort(seq.request_id, FinishReason.ERROR, error.code, error.message)
            if output is not None:
                outputs.append(output)
        return outputs

    @property
    def has_unfinished(self) -> bool:
        """Whether ``step`` has sequences to run or steps to collect. Reservations and held prefills do not count."""
        store = self._store
        return bool(store.running or store.waiting or store.committed or self._in_flight)

    @property
    def is_idle(self) -> bool:
        """Whether the last step found nothing to run: until a request comes, goes or is committed, or
        ``next_deadline`` passes, another one will not either (sequences may wait for blocks that handoffs hold)."""
        return self._is_idle

    @property
    def next_deadline(self) -> float | None:
        """When ``step`` must be called at the latest, on the engine's clock."""
        return self._expirations.next

    def stats(self) -> EngineStats:
        """A snapshot; costs some microseconds per live request."""
        store = self._store
        states = [seq.state for seq in store.sequences.values()]
        queued = (seq.num_tokens - seq.num_computed_tokens for seq in (*store.waiting, *store.prefilling))
        return EngineStats(
            num_running=len(store.running),
            num_waiting=len(store.waiting) + len(store.committed),
            num_reserved=states.count(SequenceState.RESERVED),
            num_held=states.count(SequenceState.HELD) + states.count(SequenceState.EXPIRED),
            num_queued_tokens=sum(queued),
            num_total_blocks=store.pool.num_blocks,
            num_free_blocks=store.pool.num_free,
            num_steps=self._scheduler.num_steps,
            num_finished=self._num_finished,
            num_preemptions=store.num_preemptions,
            num_generated_tokens=self._num_generated_tokens,
            num_prefix_cache_query_tokens=store.cache.num_query_tokens,
            num_prefix_cache_hit_tokens=store.cache.num_hit_tokens,
            num_leaked_blocks=store.num_leaked_blocks(),
            recent_prefix_hashes=store.cache.recent_hashes(),
        )

    def check_integrity(self) -> None:
        """Compare all books with each other; for tests and idle times.

        Raises:
            InternalError: naming what is broken.
        """
        self._store.check_integrity()

    # -- inside --------------------------------------------------------------------------------------------------

    def _check(self, request: Request) -> None:
        if self.failure is not None:
            raise UnavailableError(f"the group has failed: {self.failure.message}")
        if request.request_id in self._store.sequences:
            raise AlreadyExistsError(f"request {request.request_id!r} is live already", field="request_id")
        check_request(self.config, request)

    def _new_sequence(self, request: Request) -> Sequence:
        self._num_arrivals += 1
        self._is_idle = False
        return Sequence(
            request,
            arrival=self._num_arrivals,
            arrival_s=self._clock(),
            max_total_tokens=self._max_total_tokens,
            eos_token_ids=self._eos_token_ids,
        )

    def _handoff_limit(self, request: Request) -> float:
        limit = self._clock() + self.config.scheduler.handoff_timeout_s
        return limit if request.deadline is None else min(limit, request.deadline)

    def _expire_at(self, seq: Sequence, time: float | None) -> None:
        self._expirations.set(seq, time, len(self._store.sequences))

    def _expire(self) -> list[SequenceOutput]:
        outputs: list[SequenceOutput] = []
        if self._expirations.next is None:
            return outputs
        for seq in self._expirations.pop_until(self._clock()):
            if seq.state in _IN_HANDOFF:
                self._store.expire(seq)
                outputs.append(self._final_output(seq, FinishReason.DEADLINE))
            else:
                outputs.append(self._finish(seq, FinishReason.DEADLINE))
        return outputs

    def _finish(
        self, seq: Sequence, reason: FinishReason, error_code: ErrorCode | None = None, error: str = ""
    ) -> SequenceOutput:
        self._drop(seq)
        return self._final_output(seq, reason, error_code, error)

    def _final_output(
        self, seq: Sequence, reason: FinishReason, error_code: ErrorCode | None = None, error: str = ""
    ) -> SequenceOutput:
        self._num_finished += 1
        return SequenceOutput(
            seq.request_id,
            num_cached_tokens=seq.num_cached_tokens,
            finish_reason=reason,
            error_code=error_code,
            error=error,
        )

    def _drop(self, seq: Sequence) -> None:
        self._is_idle = False
        seq.expires_at = None
        self._store.release(seq)

    def _check_result(self, step: ScheduledStep, result: StepResult) -> None:
        token_ids, num_samples = result.token_ids, int(step.plan.samples.sum())
        if result.step_id != step.plan.step_id or len(token_ids) != num_samples:
            raise InternalError(
                f"step {step.plan.step_id} with {num_samples} samples was answered by step {result.step_id}"
                f" with {len(token_ids)}"
            )
        if num_samples and not (token_ids.min() >= NO_TOKEN and token_ids.max() < len(self._is_eos)):
            raise InternalError(f"step {result.step_id} sampled a token that is not in the vocabulary")

    def _take_up(self, step: ScheduledStep, result: StepResult, outputs: list[SequenceOutput]) -> None:
        num_decodes = len(step.decode_seqs)
        if num_decodes:
            self._take_up_decodes(step.decode_rows, step.decode_seqs, result, outputs)
        samples = iter(result.token_ids[num_decodes:].tolist())
        for chunk in step.chunks:
            token = next(samples) if chunk.samples else None
            if not chunk.seq.has_ended:
                self._take_up_chunk(chunk, token, result, outputs)

    def _take_up_decodes(
        self, rows: NDArray[np.intp], seqs: list[Sequence], result: StepResult, outputs: list[SequenceOutput]
    ) -> None:
        """One token for each row, except those of sequences that ended meanwhile. The engine's hottest code."""
        table, tokens = self._store.table, result.token_ids[: len(seqs)]
        if self._store.has_ending or tokens.min() == NO_TOKEN:
            for seq, token in zip(seqs, tokens.tolist(), strict=True):
                if token == NO_TOKEN and not seq.has_ended:
                    outputs.append(self._finish_undefined(seq))
            live = [i for i, seq in enumerate(seqs) if not seq.has_ended]
            rows, tokens, seqs = rows[live], tokens[live], [seqs[i] for i in live]
        num_tokens = table.num_tokens[rows] + 1
        table.num_tokens[rows] = num_tokens
        table.input_token[rows] = tokens
        table.ready[rows] = True
        may_end = (num_tokens >= table.max_len[rows]) | self._is_eos[tokens] | table.has_stop_ids[rows]
        fills_block = (num_tokens - 1) % self._store.block_size == 0
        first = len(outputs)
        for seq, token in zip(seqs, tokens.tolist(), strict=True):
            seq.token_ids.append(token)
            outputs.append(SequenceOutput(seq.request_id, (token,), (), None, seq.num_cached_tokens))
        self._num_generated_tokens += len(seqs)
        if result.logprobs:
            for i, row in enumerate(rows.tolist()):
                if row in result.logprobs:
                    outputs[first + i] = replace(outputs[first + i], logprobs=(result.logprobs[row],))
        if fills_block.any():
            for i in np.flatnonzero(fills_block).tolist():
                self._store.cache.register(seqs[i], seqs[i].num_tokens - 1)
        if may_end.any():
            for i in np.flatnonzero(may_end).tolist():
                reason = seqs[i].finish_reason()
                if reason is not None:
                    outputs[first + i].finish_reason = reason
                    self._num_finished += 1
                    self._drop(seqs[i])

    def _finish_undefined(self, seq: Sequence) -> SequenceOutput:
        """Overflow in 16-bit floats, or a damaged weight, made logits that name no token."""
        error = f"the model's logits at position {seq.num_tokens} are not finite"
        return self._finish(seq, FinishReason.ERROR, ErrorCode.INTERNAL, error)

    def _take_up_chunk(
        self, chunk: Chunk, token: int | None, result: StepResult, outputs: list[SequenceOutput]
    ) -> None:
        seq = chunk.seq
        if token == NO_TOKEN:
            outputs.append(self._finish_undefined(seq))
            return
        self._store.cache.register(seq, chunk.end)
        if seq.prompt_logprobs is not None:
            seq.prompt_logprobs += result.prompt_logprobs.get(seq.row, ())
        if token is None:
            return
        seq.token_ids.append(token)
        self._num_generated_tokens += 1
        logprobs = result.logprobs.get(seq.row)
        output = SequenceOutput(
            seq.request_id,
            (token,),
            () if logprobs is None else (logprobs,),
            None if seq.prompt_logprobs is None else tuple(seq.prompt_logprobs),
            seq.num_cached_tokens,
            seq.finish_reason(),
        )
        outputs.append(output)
        seq.prompt_logprobs = None
        if output.finish_reason is not None:
            self._num_finished += 1
            self._drop(seq)
        elif seq.request.phase is Phase.PREFILL:
            self._store.hold(seq)
            self._expire_at(seq, self._handoff_limit(seq.request))
        else:
            self._store.start_decoding(seq)
