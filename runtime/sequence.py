"""A request on its way through an engine, and the per-row arrays of those that run.

    add_request                          reserve
         |                                  |
         v             preempted            v             commit
      WAITING <--------------------+     RESERVED -----------------------> COMMITTED
         |  gets row and blocks     |        | deadline                        | gets a row
         v                          |        v                                 |
      PREFILLING -------------------+     EXPIRED (ended; blocks held until    |
         |  first token             |        ^      a transfer lets them go)   |
         +--> DECODING -------------+        | deadline                        |
         +--> HELD (Phase.PREFILL) ----------+                                 |
                                                  PREFILLING <-----------------+

Every state can go to FINISHED. A committed sequence enters PREFILLING with one token to catch up: there are no
phases, only tokens whose KV is not computed yet.
"""

from __future__ import annotations

from enum import Enum, auto

import numpy as np

from .request import FinishReason, Phase, Request, TokenLogprobs

PRIORITY_HEAD_START_S = 60.0


class SequenceState(Enum):
    """Where a sequence stands; who holds what: see the picture above."""

    WAITING = auto()  # no row, no blocks
    PREFILLING = auto()  # row and all blocks for its known tokens; computes several tokens a step
    DECODING = auto()  # row and blocks; one token a step
    RESERVED = auto()  # blocks, which a KV transfer writes
    COMMITTED = auto()  # blocks with the prompt's KV; waits for a row
    HELD = auto()  # blocks, which a KV transfer reads
    EXPIRED = auto()  # has ended, but a KV transfer may still touch its blocks
    FINISHED = auto()  # has ended; blocks are home, or come home with the step in flight


class Sequence:
    """One request's tokens, blocks and progress. Changed by scheduler and engine only.

    Attributes:
        key: total order of service, lower first: arrival time, with ``PRIORITY_HEAD_START_S`` added per priority
            level, then arrival number. It never changes, and every key has finitely many others below it whatever
            arrives later, which is why nobody starves.
        token_ids: prompt and outputs.
        num_computed_tokens: leading tokens whose KV is computed or being computed; not kept up while DECODING,
            where it is always all but the last.
        num_cached_tokens: prompt tokens that came from the prefix cache, or were not sent because they were in it.
        min_len, max_len: total tokens before which no end-of-sequence counts, and at which the sequence ends.
        prompt_logprobs: collected so far; None when not asked for, or delivered.
        expires_at: when a reservation or a held prefill ends, on the engine's clock.
    """

    __slots__ = (
        "block_hashes",
        "block_ids",
        "expires_at",
        "is_first_admission",
        "key",
        "max_len",
        "min_len",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_prompt_tokens",
        "num_registered_blocks",
        "prompt_logprobs",
        "request",
        "request_id",
        "row",
        "state",
        "stop_ids",
        "token_ids",
    )

    def __init__(
        self,
        request: Request,
        *,
        arrival: int,
        arrival_s: float,
        max_total_tokens: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        params = request.params
        self.request = request
        self.request_id = request.request_id
        self.key = (arrival_s + PRIORITY_HEAD_START_S * request.priority, arrival)
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.max_len = min(self.num_prompt_tokens + params.max_tokens, max_total_tokens)
        self.min_len = self.num_prompt_tokens + params.min_tokens
        stop_ids = frozenset(params.stop_token_ids)
        self.stop_ids = stop_ids if params.ignore_eos else stop_ids | eos_token_ids
        self.state = SequenceState.RESERVED if request.phase is Phase.DECODE else SequenceState.WAITING
        self.row = -1
        self.block_ids: list[int] = []
        self.block_hashes: list[bytes] = []
        self.num_registered_blocks = 0
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.is_first_admission = True
        delivers_prompt = params.prompt_logprobs is not None and request.phase is not Phase.DECODE
        self.prompt_logprobs: list[TokenLogprobs] | None = [] if delivers_prompt else None
        self.expires_at: float | None = None

    @property
    def num_tokens(self) -> int:
        """Known tokens, prompt and outputs."""
        return len(self.token_ids)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt positions must really be computed."""
        return self.prompt_logprobs is not None

    @property
    def has_ended(self) -> bool:
        """Whether its finish reason has been given."""
        return self.state is SequenceState.FINISHED or self.state is SequenceState.EXPIRED

    def finish_reason(self) -> FinishReason | None:
        """Whether the last known token ends the sequence, and why."""
        num_tokens = len(self.token_ids)
        if num_tokens >= self.min_len and self.token_ids[-1] in self.stop_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if num_tokens >= self.max_len else None

    def forget_kv(self) -> list[int]:
        """Back to the start, tokens kept: whoever calls frees the blocks that this returns."""
        blocks, self.block_ids = self.block_ids, []
        self.num_registered_blocks = 0
        self.num_computed_tokens = 0
        if self.prompt_logprobs:
            self.prompt_logprobs = []
        return blocks


class RowTable:
    """Per-row state of running sequences in preallocated arrays, all of shape [max_num_seqs].

    Rows of decoding sequences are handled by whole-array operations on these, never one by one.

    Attributes:
        in_flight: steps submitted and not collected that the row is part of.
        ready: the row decodes and its last token is known.
        num_tokens: known tokens of a decoding row.
        capacity: tokens that fit its blocks.
        max_len, has_stop_ids: see ``Sequence``; whether there are ids besides the end-of-sequence ones.
        input_token: last sampled token, the next step's input.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self.in_flight = np.zeros(max_num_seqs, np.int32)
        self.ready = np.zeros(max_num_seqs, np.bool_)
        self.num_tokens = np.zeros(max_num_seqs, np.int32)
        self.capacity = np.zeros(max_num_seqs, np.int32)
        self.max_len = np.zeros(max_num_seqs, np.int32)
        self.has_stop_ids = np.zeros(max_num_seqs, np.bool_)
        self.input_token = np.zeros(max_num_seqs, np.int32)

    def start_decoding(self, seq: Sequence, block_size: int) -> None:
        """Fill the row from a sequence whose last token has just been sampled."""
        row = seq.row
        self.ready[row] = True
        self.num_tokens[row] = seq.num_tokens
        self.capacity[row] = len(seq.block_ids) * block_size
        self.max_len[row] = seq.max_len
        self.has_stop_ids[row] = bool(seq.request.params.stop_token_ids)
        self.input_token[row] = seq.token_ids[-1]
