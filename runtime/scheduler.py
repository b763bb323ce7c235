"""Decides which tokens a step computes.

A step is filled in this order:

1.  Decoding rows, one token each: nobody's prompt makes them wait (Sarathi-Serve). One that needs a block takes it,
    if necessary from the sequence with the highest key, which is preempted: it loses row and blocks and queues anew
    with its old key, to be recomputed (mostly from the prefix cache).
2.  What is left of ``max_num_batched_tokens`` goes to chunks of prompts, under way or waiting, lowest key first. A
    waiting sequence is admitted when there are blocks for all its known tokens and, beyond them, one for each
    running sequence to grow into. Who does not fit blocks those behind it, so that it cannot be overtaken for ever;
    it preempts sequences that run with lower priority and a higher key, when that is enough.

Nobody starves. Keys are fixed and totally ordered, and finitely many are lower than a given one, so it is enough
that the live sequence with the lowest key gets on. Running, it is never preempted, gets a block before any other and
ends after at most max_len tokens. Waiting, it is tried first in every step, and neither admissions nor reservations
may take the blocks that it waits for, so it is admitted when enough others have ended. (Committed sequences may
overtake it, but only as many as were reserved before it began to wait.) Blocks that cannot be preempted belong to
handoffs, which end by a timeout.

A sequence with a step in flight is not preempted; whoever needs its blocks waits for the step, and comes before it
when the next one is made.
"""

from __future__ import annotations

from collections import Counter
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from .config import EngineConfig
from .errors import ResourceExhaustedError
from .plan import StepPlan
from .scheduled_step import Chunk, ScheduledStep
from .sequence import Sequence, SequenceState
from .sequence_store import SequenceStore

MAX_DEFERRED = 64
# Plans travel to the ranks with all known tokens of whom they admit: the last sequence admitted may exceed this.
MAX_ADMITTED_TOKENS = 2**20
# Every prompt position with logprobs needs logits over the whole vocabulary; this bounds their memory.
MAX_PROMPT_LOGPROB_TOKENS = 512
_key = attrgetter("key")


class Scheduler:
    """Fills steps from a store. Knows no time and no executor.

    Attributes:
        num_steps: made so far.
    """

    def __init__(self, config: EngineConfig, store: SequenceStore) -> None:
        self.num_steps = 0
        self._store = store
        self._max_num_batched_tokens = config.scheduler.max_num_batched_tokens
        self._depth = config.parallel.pipeline_parallel_size
        self._computing: Counter[bytes] = Counter()  # prefix blocks that steps in flight complete

    def reserve(self, seq: Sequence) -> None:
        """Give a new RESERVED sequence blocks for its prompt and one token.

        Leaves a block for each running sequence, and what the first waiting one needs. Gives out nothing while the
        ranks have not been told of a preempted handoff: they might still send from blocks that this one's KV goes to.

        Raises:
            ResourceExhaustedError: too few blocks are free; nothing is changed.
        """
        if self._store.has_untold_handoffs:
            raise ResourceExhaustedError("KV blocks are just being taken back from a handoff")
        store, pool = self._store, self._store.pool
        found = store.cache.match(seq)
        kept = len(store.running) + (store.num_blocks_for(store.waiting[0]) if store.waiting else 0)
        needed, room = self._num_needed(seq, found), max(0, pool.num_free - kept)
        if needed > room:
            raise ResourceExhaustedError(
                f"the prompt of {seq.num_prompt_tokens} tokens needs {needed} KV blocks, {room} can be reserved:"
                f" {pool.num_free} of {pool.num_blocks} are free, {kept} kept for running and waiting requests",
                field="prompt",
                value=needed,
                limit=room,
            )
        store.add_reserved(seq, found)

    def schedule(self) -> ScheduledStep | None:
        """Make the next step, or None when nothing can run now. What it returns counts as submitted."""
        num_preemptions = self._store.num_preemptions
        rows, seqs, grown = self._schedule_decodes()
        chunks = self._schedule_prefills(self._max_num_batched_tokens - len(seqs))
        if self._store.num_preemptions > num_preemptions:
            keep = [i for i, seq in enumerate(seqs) if seq.state is SequenceState.DECODING]
            rows, seqs = rows[keep], [seqs[i] for i in keep]
            grown = [(seq, block) for seq, block in grown if seq.state is SequenceState.DECODING]
        if not seqs and not chunks:
            return None
        return self._build(rows, seqs, grown, chunks)

    def collected(self, step: ScheduledStep) -> None:
        """A step is no longer in flight, and its tokens have been taken up."""
        self._store.collected(step.rows)
        for chunk in step.chunks:
            self._computing -= Counter(chunk.block_hashes)

    # -- decodes -------------------------------------------------------------------------------------------------

    def _schedule_decodes(self) -> tuple[NDArray[np.intp], list[Sequence], list[tuple[Sequence, int]]]:
        """Rows that decode in this step, by key, each with room for its token, and the blocks given out for it."""
        table = self._store.table
        rows, seqs = self._store.decoding()
        grown: list[tuple[Sequence, int]] = []
        if not seqs:
            return rows, seqs, grown
        share = -(-len(seqs) // self._depth)  # as many batches as pipeline stages, each with its share of the rows
        ready = table.ready[rows]
        if not ready.all():
            index = np.flatnonzero(ready)
            rows, seqs = rows[index], [seqs[i] for i in index.tolist()]
        if len(seqs) > share:
            rows, seqs = rows[:share], seqs[:share]
        short = table.num_tokens[rows] > table.capacity[rows]
        if not short.any():
            return rows, seqs, grown
        stalled = set()
        for i in np.flatnonzero(short).tolist():
            seq = seqs[i]
            if seq.state is not SequenceState.DECODING:  # preempted for one before it
                continue
            if self._make_block_free(seq):
                grown.append((seq, self._store.grow(seq)))
            else:
                stalled.add(i)
        if stalled:
            keep = [i for i in range(len(seqs)) if i not in stalled]
            rows, seqs = rows[keep], [seqs[i] for i in keep]
        return rows, seqs, grown

    def _make_block_free(self, seq: Sequence) -> bool:
        """Preempt until a block is free. False: ``seq`` must wait, or was itself the one to preempt."""
        store = self._store
        while not store.pool.num_free:
            last = store.running[-1]
            if store.committed and store.committed[-1].key > last.key:
                store.preempt(store.committed[-1])
            elif last is seq:
                # Whoever else holds blocks runs and will end, or is a handoff and will end, or is committed: only
                # that could wait for this one, namely for its row.
                if store.committed:
                    store.preempt(seq)
                return False
            elif store.table.in_flight[last.row]:
                return False
            else:
                store.preempt(last)
        return True

    # -- prefills ------------------------------------------------------------------------------------------------

    def _schedule_prefills(self, budget: int) -> list[Chunk]:
        """Chunks for running, waiting and committed sequences, lowest key first, at most ``budget`` tokens."""
        store, chunks = self._store, list[Chunk]()
        if not store.prefilling and not store.waiting and not store.committed:
            return chunks
        prefilling = [seq for seq in store.prefilling if seq.num_computed_tokens < seq.num_tokens]
        num_seen = num_deferred = num_admitted_tokens = 0
        logprob_budget = MAX_PROMPT_LOGPROB_TOKENS
        is_blocked = False
        # A committed sequence needs one token, like a decode, and like one it does not wait for a prompt.
        kept = min(len(store.committed), store.num_free_rows)
        while budget > 0:
            heads = prefilling[num_seen : num_seen + 1]
            if num_admitted_tokens < MAX_ADMITTED_TOKENS:
                if not is_blocked and num_deferred < MAX_DEFERRED and budget > kept:
                    heads += store.waiting[num_deferred : num_deferred + 1]
                if store.num_free_rows:
                    heads += store.committed[:1]
            if not heads:
                break
            seq = min(heads, key=_key)
            if num_seen < len(prefilling) and seq is prefilling[num_seen]:
                num_seen += 1
                if seq.row < 0:  # preempted for this step
                    continue
            elif seq.state is SequenceState.COMMITTED:
                kept = max(0, kept - 1)
                store.admit(seq, [])
                num_admitted_tokens += seq.num_tokens
            else:
                found = store.cache.match(seq)
                if self._prefix_is_coming(seq, len(found)) or (not logprob_budget and _asks_prompt_logprobs(seq)):
                    num_deferred += 1
                    continue
                if not self._make_room(seq, found):
                    is_blocked = True
                    continue
                store.admit(seq, found)
                num_admitted_tokens += seq.num_tokens
            size = min(seq.num_tokens - seq.num_computed_tokens, budget - kept)
            if _asks_prompt_logprobs(seq) and seq.num_computed_tokens < seq.num_prompt_tokens:
                size = min(size, logprob_budget)
                logprob_budget -= size
            if size > 0:
                budget -= size
                chunks.append(self._take_chunk(seq, size))
        return chunks

    def _take_chunk(self, seq: Sequence, size: int) -> Chunk:
        start = seq.num_computed_tokens
        end = seq.num_computed_tokens = start + size
        block_size = self._store.block_size
        hashes = seq.block_hashes[start // block_size : end // block_size]
        self._computing.update(hashes)
        return Chunk(seq, start, end, samples=end == seq.num_tokens, block_hashes=hashes)

    def _prefix_is_coming(self, seq: Sequence, num_found: int) -> bool:
        """Whether a step in flight, or this one, computes the next prefix block: then waiting for it saves work."""
        if not self._computing or num_found >= (seq.num_tokens - 1) // self._store.block_size:
            return False
        return not seq.wants_prompt_logprobs and seq.block_hashes[num_found] in self._computing

    def _make_room(self, seq: Sequence, found: list[int]) -> bool:
        """Whether a waiting sequence can be admitted, after preempting running ones of lower priority if need be."""
        if self._has_room(seq, found):
            return True
        store = self._store
        victims = []
        for victim in reversed(store.running):
            if victim.key < seq.key or victim.request.priority <= seq.request.priority:
                break
            victims.append(victim)
        if not victims:
            return False
        num_freed = store.pool.num_freed_by((victim.block_ids for victim in victims), except_for=found)
        num_left = len(store.running) - len(victims)
        if self._num_needed(seq, found) + num_left > store.pool.num_free + num_freed:
            return False
        for victim in victims:
            if not store.table.in_flight[victim.row]:
                store.preempt(victim)
                if self._has_room(seq, found):
                    return True
        return False

    def _has_room(self, seq: Sequence, found: list[int]) -> bool:
        store = self._store
        enough = self._num_needed(seq, found) + len(store.running) <= store.pool.num_free
        return enough and store.num_free_rows > 0

    def _num_needed(self, seq: Sequence, found: list[int]) -> int:
        """By how much ``num_free`` of the pool shrinks when ``seq`` takes its blocks, ``found`` among them."""
        return self._store.num_blocks_for(seq) - len(found) + self._store.pool.num_unused(found)

    # -- the plan ------------------------------------------------------------------------------------------------

    def _build(
        self,
        rows: NDArray[np.intp],
        seqs: list[Sequence],
        grown: list[tuple[Sequence, int]],
        chunks: list[Chunk],
    ) -> ScheduledStep:
        table, num_decodes = self._store.table, len(seqs)
        num_tokens = np.ones(num_decodes + len(chunks), np.int32)
        samples = np.ones(num_decodes + len(chunks), np.bool_)
        positions = table.num_tokens[rows] - 1
        input_tokens = table.input_token[rows]
        table.ready[rows] = False
        all_rows = rows
        if chunks:
            all_rows = np.concatenate((rows, np.array([chunk.seq.row for chunk in chunks], np.intp)))
            num_tokens[num_decodes:] = [chunk.end - chunk.start for chunk in chunks]
            samples[num_decodes:] = [chunk.samples for chunk in chunks]
            positions = np.concatenate((positions, np.array([chunk.start for chunk in chunks], np.int32)))
            input_tokens = np.concatenate((input_tokens, np.full(len(chunks), -1, np.int32)))
        self._store.submitted(all_rows)
        released, admitted = self._store.take_changes()
        plan = StepPlan(
            self.num_steps,
            all_rows.astype(np.int32),
            num_tokens,
            positions,
            input_tokens,
            samples,
            released,
            admitted,
            new_block_rows=np.array([seq.row for seq, _ in grown], np.int32),
            new_block_ids=np.array([block for _, block in grown], np.int32),
        )
        self.num_steps += 1
        return ScheduledStep(plan, all_rows, rows, seqs, chunks)


def _asks_prompt_logprobs(seq: Sequence) -> bool:
    """Whether the ranks compute them for each prompt position, delivered before or not."""
    return seq.request.params.prompt_logprobs is not None
