"""Chooses the workers of a sequence: snapshots in, decision out. Pure; the dispatcher and the simulator call it.

Every eligible replica is scored (power of *all* choices: a pool is tens of replicas, so sampling two saves nothing),
and the cheapest decode worker with the cheapest way to compute the prompt wins. The unit is *tokens of work*, the
work of computing one prompt token:

    decode worker    expected output tokens * num_seqs there                  it shares their steps
                     + WAITING_SHARE * the same for those beyond max_num_seqs  they wait for a row
                     + expected output tokens that find no free block          will be recomputed after a preemption
    prefill worker   tokens queued there + prompt tokens it does not hold
                     + TRANSFER_SHARE * prompt tokens that decode lacks        their KV is moved
                     + HANDOFF_TOKENS                                          one more hop, and the commit
    local prefill    LOCAL_SHARE * (tokens queued + prompt tokens that decode lacks)   it stalls the decodes there

Local prefill means that the decode worker computes the prompt itself: a MIXED worker may always, a DECODE worker
when it holds nearly all of it (at most ``LOCAL_PREFILL_BLOCKS`` blocks to go), or when there is no prefill worker but
such as have failed the sequence: the first is still to come, or the last is lost. What a replica holds is told by
``cached_prefixes``: the first eight bytes of the chained block hashes of ``runtime/prefix_cache.py``. Stale hints
cost time, never text.

Ties go to the smallest worker id, so equal inputs give equal decisions whatever the snapshots' order.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..runtime.errors import ResourceExhaustedError, UnavailableError
from ..runtime.role import WorkerRole

WAITING_SHARE = 2.0
TRANSFER_SHARE = 0.1
HANDOFF_TOKENS = 64.0
LOCAL_SHARE = 1.5
LOCAL_PREFILL_BLOCKS = 2
# Nobody knows how long an answer gets; max_tokens is often a limit far beyond it.
MAX_EXPECTED_OUTPUT_TOKENS = 256


@dataclass(frozen=True, slots=True)
class ReplicaSnapshot:
    """What the router knows of a replica that is up.

    Attributes:
        num_queued_tokens: prompt tokens not yet computed there.
        num_free_blocks: blocks nobody uses, cached ones included.
        cached_prefixes: truncated hashes of prompt prefixes in its cache; may be stale and incomplete.
    """

    worker_id: str
    role: WorkerRole
    draining: bool = False
    num_running: int = 0
    num_waiting: int = 0
    num_queued_tokens: int = 0
    num_total_blocks: int = 0
    num_free_blocks: int = 0
    max_num_seqs: int = 1
    cached_prefixes: frozenset[int] = frozenset()

    @property
    def num_seqs(self) -> int:
        """Sequences that share its steps or wait to."""
        return self.num_running + self.num_waiting


@dataclass(frozen=True, slots=True)
class RoutingQuery:
    """What the router knows of a sequence.

    Attributes:
        prefix_keys: truncated hashes of the prompt's full blocks, shortest prefix first.
        failed_workers: those that failed the sequence in earlier epochs.
    """

    num_prompt_tokens: int
    max_tokens: int
    prefix_keys: tuple[int, ...] = ()
    failed_workers: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class RoutingDecision:
    """Who computes what, and what the router expects it to take: the caller adds that to coming snapshots.

    Attributes:
        prefill_worker: None when the decode worker computes the prompt itself.
        num_prefill_tokens: prompt tokens to compute, wherever.
        num_decode_blocks: blocks that the decode worker has to find free.
    """

    prefill_worker: str | None
    decode_worker: str
    num_prefill_tokens: int
    num_decode_blocks: int


class BusyError(ResourceExhaustedError):
    """No replica has room now, but one will: the sequence fits when others are done."""


@dataclass(frozen=True, slots=True)
class Router:
    """Routing for workers whose KV blocks have ``block_size`` tokens.

    Attributes:
        max_queued_tokens: a worker with more prompt tokens before it gets no further prompt: the sequence's decode
            blocks, reserved before prefill starts, would be held for too long, and another may be free sooner.
    """

    block_size: int
    max_queued_tokens: int = 8192

    def route(self, query: RoutingQuery, replicas: Collection[ReplicaSnapshot]) -> RoutingDecision:
        """Choose the cheapest workers. Draining replicas never; those that failed the sequence only when there is no
        other, and decode workers have no time to compute prompts.

        Raises:
            UnavailableError: no decode worker takes requests.
            BusyError: the sequence fits a replica, but none has free blocks for it now, or a short enough queue.
            ResourceExhaustedError: the prompt is larger than any replica's whole KV pool.
        """
        decoders = _available(replicas, WorkerRole.DECODE, WorkerRole.MIXED)
        if not decoders:
            raise UnavailableError("no decode worker takes requests", pool="decode", retry_after_s=1)
        fitting = self._with_room(query, _fresh(query, decoders) or decoders)
        prefillers = _available(replicas, WorkerRole.PREFILL)
        fresh = _fresh(query, prefillers)
        decision = self._cheapest(query, fitting, fresh)
        if decision is None and not fresh:
            decision = self._cheapest(query, fitting, prefillers)
        if decision is None:
            raise BusyError("all that may compute the prompt have a long queue", pool="prefill", retry_after_s=1)
        return decision

    def num_cached_tokens(self, query: RoutingQuery, replica: ReplicaSnapshot) -> int:
        """Leading prompt tokens that ``replica`` holds: whole blocks, and at least one token is left to compute."""
        limit = (query.num_prompt_tokens - 1) // self.block_size
        for num_blocks in range(min(limit, len(query.prefix_keys)), 0, -1):
            if query.prefix_keys[num_blocks - 1] in replica.cached_prefixes:
                return num_blocks * self.block_size
        return 0

    def _with_room(self, query: RoutingQuery, decoders: Sequence[ReplicaSnapshot]) -> list[ReplicaSnapshot]:
        """Those with free blocks for the prompt and one more token.

        Blocks of a cached prefix count as needed: a free cached block is taken when it is used, and that another
        sequence shares it right now is not known here.
        """
        needed = self._num_blocks(query.num_prompt_tokens + 1)
        fitting = [d for d in decoders if d.num_free_blocks >= needed]
        if fitting:
            return fitting
        largest = max(d.num_total_blocks for d in decoders)
        if needed > largest:
            raise ResourceExhaustedError(
                f"the prompt needs {needed} KV blocks, the largest decode worker has {largest}",
                field="prompt",
                value=needed,
                limit=largest,
            )
        raise BusyError(f"no decode worker has {needed} free KV blocks now", pool="decode", retry_after_s=1)

    def _cheapest(
        self, query: RoutingQuery, decoders: Sequence[ReplicaSnapshot], prefillers: Sequence[ReplicaSnapshot]
    ) -> RoutingDecision | None:
        """Of decode workers with room, and of these prefill workers; None when nobody may compute the prompt now."""
        prefill = min(
            (p for p in prefillers if self._takes_prompts(p)),
            key=lambda p: (self._prefill_work(query, p), p.worker_id),
            default=None,
        )
        best: tuple[float, str] | None = None
        decision: RoutingDecision | None = None
        for decoder in decoders:
            cost, where = self._cheapest_prefill(query, decoder, prefill, no_prefillers=not prefillers)
            if where is None:
                continue
            score = self._decode_cost(query, decoder) + cost, decoder.worker_id
            if best is None or score < best:
                best, decision = score, self._decision(query, decoder, where)
        return decision

    def _cheapest_prefill(
        self, query: RoutingQuery, decoder: ReplicaSnapshot, prefill: ReplicaSnapshot | None, *, no_prefillers: bool
    ) -> tuple[float, ReplicaSnapshot | None]:
        """Cost of computing the prompt for ``decoder`` and where; None when nobody may."""
        num_cached = self.num_cached_tokens(query, decoder)
        num_left = query.num_prompt_tokens - num_cached
        is_almost_there = num_cached > 0 and num_left <= LOCAL_PREFILL_BLOCKS * self.block_size
        # What does not find a short queue then waits for a prefill worker to come, instead of filling this one up.
        stands_in = no_prefillers and self._takes_prompts(decoder)
        options: list[tuple[float, ReplicaSnapshot]] = []
        if decoder.role is WorkerRole.MIXED or is_almost_there or stands_in:
            options.append((LOCAL_SHARE * self._prefill_work(query, decoder), decoder))
        if prefill is not None:
            handoff = TRANSFER_SHARE * num_left + HANDOFF_TOKENS
            options.append((self._prefill_work(query, prefill) + handoff, prefill))
        return min(options, key=lambda option: option[0], default=(0.0, None))

    def _takes_prompts(self, replica: ReplicaSnapshot) -> bool:
        return replica.num_queued_tokens <= self.max_queued_tokens

    def _prefill_work(self, query: RoutingQuery, replica: ReplicaSnapshot) -> float:
        return replica.num_queued_tokens + query.num_prompt_tokens - self.num_cached_tokens(query, replica)

    def _decode_cost(self, query: RoutingQuery, decoder: ReplicaSnapshot) -> float:
        expected = min(query.max_tokens, MAX_EXPECTED_OUTPUT_TOKENS)
        num_beyond = max(0, decoder.num_seqs + 1 - decoder.max_num_seqs)
        room = (decoder.num_free_blocks - self._num_blocks(query.num_prompt_tokens)) * self.block_size
        return expected * (decoder.num_seqs + WAITING_SHARE * num_beyond) + max(0, expected - room)

    def _decision(self, query: RoutingQuery, decoder: ReplicaSnapshot, where: ReplicaSnapshot) -> RoutingDecision:
        return RoutingDecision(
            prefill_worker=None if where is decoder else where.worker_id,
            decode_worker=decoder.worker_id,
            num_prefill_tokens=query.num_prompt_tokens - self.num_cached_tokens(query, where),
            num_decode_blocks=self._num_blocks(query.num_prompt_tokens + 1),
        )

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)


def _available(replicas: Collection[ReplicaSnapshot], *roles: WorkerRole) -> list[ReplicaSnapshot]:
    return [r for r in replicas if r.role in roles and not r.draining]


def _fresh(query: RoutingQuery, replicas: Collection[ReplicaSnapshot]) -> list[ReplicaSnapshot]:
    """Those that have not failed the sequence."""
    return [r for r in replicas if r.worker_id not in query.failed_workers]
