"""Decides which tokens a step computes, and owns rows, blocks and queues.

A step is filled in this order:

1.  Decoding rows, one token each: nobody's prompt makes them wait (Sarathi-Serve). One that needs a block takes it,
    if necessary from the sequence with the highest key, which is preempted: it loses row and blocks and queues anew
    with its old key, to be recomputed (mostly from the prefix cache).
2.  What is left of ``max_num_batched_tokens`` goes to chunks of prompts, under way or waiting, lowest key first. A
    waiting sequence is admitted when there are blocks for all its known tokens and, beyond them, one for each
    running sequence to grow into. Who does not fit blocks those behind it, so that it cannot be overtaken for ever;
    of these it preempts those that run with lower priority.

Nobody starves. Keys are fixed and totally ordered, and finitely many are lower than a given one. The running
sequence with the lowest key is never preempted, gets a block before any other, and ends after at most max_len
tokens. The waiting one with the lowest key is tried first in every step, and neither admissions nor reservations may
take the blocks that it waits for, so it is admitted when enough running ones have ended. Blocks that cannot be
preempted belong to handoffs, which end by a timeout.

A sequence with a step in flight keeps row and blocks until that step is collected, even when it has ended: the ranks,
or a transfer into reused blocks, must not meet it there. It is not preempted before.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from .block_pool import BlockPool
from .config import EngineConfig
from .errors import InternalError, ResourceExhaustedError
from .plan import AdmittedSequence, StepPlan
from .prefix_cache import PrefixCache
from .request import Phase
from .sequence import RowTable, Sequence, SequenceState

MAX_DEFERRED = 64
_RUNS = frozenset({SequenceState.PREFILLING, SequenceState.DECODING})
_key = attrgetter("key")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``[start, end)`` of one prefilling sequence; ``block_hashes`` are of the prefix blocks they complete."""

    seq: Sequence
    start: int
    end: int
    samples: bool
    block_hashes: list[bytes]


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """A plan and who is in it. The batch is ``decode_rows``, then ``chunks``.

    Attributes:
        rows: intp[n], all of the plan's rows.
        decode_rows: intp[m], the first m of them.
        decode_seqs: their sequences.
    """

    plan: StepPlan
    rows: NDArray[np.intp]
    decode_rows: NDArray[np.intp]
    decode_seqs: list[Sequence]
    chunks: list[Chunk]


class Scheduler:
    """Queues, rows and blocks of one engine. Not thread-safe; knows no time.

    Attributes:
        waiting: sorted by key; no row, no blocks.
        committed: sorted by key; blocks with the prompt's KV, no row.
        running: sorted by key; PREFILLING or DECODING.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._block_size = config.cache.block_size
        self._max_num_batched_tokens = config.scheduler.max_num_batched_tokens
        self._depth = config.parallel.pipeline_parallel_size
        self._max_num_seqs = config.scheduler.max_num_seqs
        self.pool = BlockPool(config.cache.num_blocks)
        self.cache = PrefixCache(
            self.pool, self._block_size, config.model.fingerprint, enabled=config.cache.enable_prefix_caching
        )
        self.table = RowTable(self._max_num_seqs)
        self.waiting: list[Sequence] = []
        self.committed: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_steps = 0
        self._prefilling: list[Sequence] = []
        self._free_rows = list(range(self._max_num_seqs - 1, -1, -1))
        self._released_rows: list[int] = []
        self._ending: list[Sequence] = []  # ended, but with a step in flight
        self._computing: Counter[bytes] = Counter()  # prefix blocks that steps in flight complete
        self._order_is_stale = False
        self._order_rows: NDArray[np.intp] = np.empty(0, np.intp)  # of decoding sequences, by key
        self._order_seqs: list[Sequence] = []
        self._admitted: list[AdmittedSequence] = []
        self._preempted: list[Sequence] = []  # by the step that is being made

    # -- entering and leaving ------------------------------------------------------------------------------------

    def enqueue(self, seq: Sequence) -> None:
        """Queue a WAITING or COMMITTED sequence."""
        insort(self.committed if seq.state is SequenceState.COMMITTED else self.waiting, seq, key=_key)

    def reserve(self, seq: Sequence) -> None:
        """Give a RESERVED sequence blocks for its prompt and one token; sets ``num_cached_tokens``.

        Leaves a block for each running sequence, and what the first waiting one needs.

        Raises:
            ResourceExhaustedError: too few blocks are free; nothing is changed.
        """
        found = self.cache.match(seq)
        num_fresh = self._num_blocks_for(seq) - len(found)
        kept = len(self.running) + (self._num_blocks_for(self.waiting[0]) if self.waiting else 0)
        room = self.pool.num_free - self.pool.num_unused(found) - kept
        if num_fresh > room:
            raise ResourceExhaustedError(
                f"the prompt of {seq.num_prompt_tokens} tokens needs {num_fresh} free KV blocks, {max(0, room)} can"
                f" be reserved ({self.pool.num_free} of {self.pool.num_blocks} are free, {kept} are kept for running"
                " and waiting requests)",
                field="prompt",
                value=num_fresh,
                limit=max(0, room),
            )
        self._take_blocks(seq, found, num_fresh)

    def start_decoding(self, seq: Sequence) -> None:
        """A PREFILLING sequence has got its token and goes on."""
        _remove(self._prefilling, seq)
        seq.state = SequenceState.DECODING
        self.table.start_decoding(seq, self._block_size)
        self._order_is_stale = True

    def hold(self, seq: Sequence) -> None:
        """A PREFILLING sequence has got its token and is handed off: it gives up its row and keeps its blocks."""
        self._leave_row(seq)
        seq.state = SequenceState.HELD

    def release(self, seq: Sequence) -> None:
        """End a sequence in any state; rows and blocks come home, after the steps in flight that it is part of."""
        if seq.state is SequenceState.WAITING:
            _remove(self.waiting, seq)
        elif seq.state is SequenceState.COMMITTED:
            _remove(self.committed, seq)
        if seq.row >= 0 and self.table.in_flight[seq.row]:
            self.table.ready[seq.row] = False
            self._leave_lists(seq)
            self._ending.append(seq)
        else:
            if seq.row >= 0:
                self._leave_row(seq)
            self.pool.free(seq.forget_kv())
        seq.state = SequenceState.FINISHED

    def collected(self, step: ScheduledStep) -> None:
        """Note that a step is no longer in flight, after its tokens have been taken up."""
        self.table.in_flight[step.rows] -= 1
        for chunk in step.chunks:
            self._computing -= Counter(chunk.block_hashes)
        if self._ending:
            for seq in self._ending:
                if not self.table.in_flight[seq.row]:
                    self._give_back_row(seq)
                    self.pool.free(seq.forget_kv())
            self._ending = [seq for seq in self._ending if seq.row >= 0]

    def abandon_steps(self) -> None:
        """Forget all steps in flight: the ranks are gone and will touch nothing any more."""
        self.table.in_flight[:] = 0
        self._computing.clear()
        for seq in self._ending:
            self._give_back_row(seq)
            self.pool.free(seq.forget_kv())
        self._ending.clear()

    @property
    def has_ending(self) -> bool:
        """Whether sequences have ended that are part of a step not collected yet."""
        return bool(self._ending)

    # -- a step --------------------------------------------------------------------------------------------------

    def schedule(self) -> ScheduledStep | None:
        """Make the next step, or None when nothing can run now. Counts as submitted when it returns."""
        self._preempted = []
        rows, seqs, grown = self._schedule_decodes()
        chunks = self._schedule_prefills(self._max_num_batched_tokens - len(seqs))
        if self._preempted:
            keep = [i for i, seq in enumerate(seqs) if seq.state is SequenceState.DECODING]
            rows, seqs = rows[keep], [seqs[i] for i in keep]
            grown = [(seq, block) for seq, block in grown if seq.state is SequenceState.DECODING]
        if not seqs and not chunks:
            return None
        return self._build(rows, seqs, grown, chunks)

    def _schedule_decodes(self) -> tuple[NDArray[np.intp], list[Sequence], list[tuple[Sequence, int]]]:
        """Rows that decode in this step, by key, each with room for its token, and the blocks given out for it."""
        if self._order_is_stale:
            self._order_seqs = [seq for seq in self.running if seq.state is SequenceState.DECODING]
            self._order_rows = np.array([seq.row for seq in self._order_seqs], np.intp)
            self._order_is_stale = False
        table, rows, seqs = self.table, self._order_rows, self._order_seqs
        grown: list[tuple[Sequence, int]] = []
        if not seqs:
            return rows, seqs, grown
        ready = table.ready[rows]
        if not ready.all():
            index = np.flatnonzero(ready)
            rows, seqs = rows[index], [seqs[i] for i in index.tolist()]
        if self._depth > 1:  # as many batches as stages, each with its share of the rows
            share = -(-len(self._order_seqs) // self._depth)
            rows, seqs = rows[:share], seqs[:share]
        short = table.num_tokens[rows] > table.capacity[rows]
        if short.any():
            stalled = set()
            for i in np.flatnonzero(short).tolist():
                seq = seqs[i]
                if seq.state is not SequenceState.DECODING:  # preempted for one before it
                    continue
                if self._make_block_free(seq):
                    grown.append((seq, self._grow(seq)))
                else:
                    stalled.add(i)
            if stalled:
                keep = [i for i in range(len(seqs)) if i not in stalled]
                rows, seqs = rows[keep], [seqs[i] for i in keep]
        return rows, seqs, grown

    def _make_block_free(self, seq: Sequence) -> bool:
        """Preempt until a block is free. False: ``seq`` must wait, or was itself the one to preempt."""
        while not self.pool.num_free:
            last = self.running[-1]
            if self.committed and self.committed[-1].key > last.key:
                self._preempt(self.committed[-1])
            elif last is seq:
                # Those that still hold blocks run and will end, or are handoffs and will end, or wait for a row:
                # the latter could wait for this one's.
                if self.committed:
                    self._preempt(seq)
                return False
            elif self.table.in_flight[last.row]:
                return False
            else:
                self._preempt(last)
        return True

    def _grow(self, seq: Sequence) -> int:
        block = self.pool.allocate(1)[0]
        seq.block_ids.append(block)
        self.table.capacity[seq.row] += self._block_size
        return block

    def _schedule_prefills(self, budget: int) -> list[Chunk]:
        """Chunks for running, waiting and committed sequences, lowest key first, at most ``budget`` tokens."""
        chunks: list[Chunk] = []
        if not self._prefilling and not self.waiting and not self.committed:
            return chunks
        prefilling = [seq for seq in self._prefilling if seq.num_computed_tokens < seq.num_tokens]
        num_seen = num_deferred = 0
        blocked = False
        # A committed sequence needs one token, like a decode, and like one it does not wait for a prompt.
        kept = min(len(self.committed), len(self._free_rows))
        while budget > 0:
            heads = prefilling[num_seen : num_seen + 1]
            if not blocked and num_deferred < MAX_DEFERRED and budget > kept:
                heads += self.waiting[num_deferred : num_deferred + 1]
            if self._free_rows:
                heads += self.committed[:1]
            if not heads:
                break
            seq = min(heads, key=_key)
            if num_seen < len(prefilling) and prefilling[num_seen] is seq:
                num_seen += 1
                if seq.row < 0:  # preempted by this step
                    continue
            elif seq.state is SequenceState.COMMITTED:
                kept = max(0, kept - 1)
                _remove(self.committed, seq)
                self._take_row(seq)
            else:
                found = self.cache.match(seq)
                if self._prefix_is_coming(seq, len(found)):
                    num_deferred += 1
                    continue
                if seq in self._preempted or not self._make_room(seq, found):
                    blocked = True
                    continue
                self._take_blocks(seq, found, self._num_blocks_for(seq) - len(found))
                _remove(self.waiting, seq)
                self._take_row(seq)
            size = min(seq.num_tokens - seq.num_computed_tokens, budget - kept)
            if size > 0:
                budget -= size
                chunks.append(self._take_chunk(seq, size))
        return chunks

    def _take_chunk(self, seq: Sequence, size: int) -> Chunk:
        start = seq.num_computed_tokens
        end = seq.num_computed_tokens = start + size
        hashes = seq.block_hashes[start // self._block_size : end // self._block_size]
        self._computing.update(hashes)
        return Chunk(seq, start, end, samples=end == seq.num_tokens, block_hashes=hashes)

    def _prefix_is_coming(self, seq: Sequence, num_found: int) -> bool:
        """Whether a step in flight, or this one, computes the next prefix block: then waiting for it saves work."""
        if not self._computing or num_found >= (seq.num_tokens - 1) // self._block_size:
            return False
        return not seq.wants_prompt_logprobs and seq.block_hashes[num_found] in self._computing

    def _make_room(self, seq: Sequence, found: list[int]) -> bool:
        """Whether a waiting sequence can be admitted, after preempting running ones of lower priority if need be."""
        if self._has_room(seq, found):
            return True
        victims = []
        num_freed = 0
        for victim in reversed(self.running):
            if victim.key < seq.key or victim.request.priority <= seq.request.priority:
                break
            victims.append(victim)
            num_freed += len(victim.block_ids)
        num_left = len(self.running) - len(victims)
        if not victims or self._num_needed(seq, found) + num_left > self.pool.num_free + num_freed:
            return False
        for victim in victims:
            if not self.table.in_flight[victim.row]:
                self._preempt(victim)
                if self._has_room(seq, found):
                    return True
        return False

    def _has_room(self, seq: Sequence, found: list[int]) -> bool:
        enough = self._num_needed(seq, found) + len(self.running) <= self.pool.num_free
        return enough and bool(self._free_rows)

    def _num_needed(self, seq: Sequence, found: list[int]) -> int:
        return self._num_blocks_for(seq) - len(found) + self.pool.num_unused(found)

    def _num_blocks_for(self, seq: Sequence) -> int:
        """Blocks for its known tokens and the next one."""
        return seq.num_tokens // self._block_size + 1

    def _build(
        self,
        rows: NDArray[np.intp],
        seqs: list[Sequence],
        grown: list[tuple[Sequence, int]],
        chunks: list[Chunk],
    ) -> ScheduledStep:
        table, num_decodes = self.table, len(seqs)
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
        table.in_flight[all_rows] += 1
        plan = StepPlan(
            self.num_steps,
            all_rows.astype(np.int32),
            num_tokens,
            positions,
            input_tokens,
            samples,
            released=tuple(self._released_rows),
            admitted=tuple(self._admitted),
            new_block_rows=np.array([seq.row for seq, _ in grown], np.int32),
            new_block_ids=np.array([block for _, block in grown], np.int32),
        )
        self._released_rows, self._admitted = [], []
        self.num_steps += 1
        return ScheduledStep(plan, all_rows, rows, seqs, chunks)

    # -- rows and blocks -----------------------------------------------------------------------------------------

    def _take_blocks(self, seq: Sequence, found: list[int], num_fresh: int) -> None:
        self.pool.share(found)
        seq.block_ids = found + self.pool.allocate(num_fresh)
        seq.num_registered_blocks = len(found)
        seq.num_computed_tokens = len(found) * self._block_size
        if seq.is_first_admission:
            seq.is_first_admission = False
            seq.num_cached_tokens = seq.num_computed_tokens
            self.cache.count(seq, seq.num_cached_tokens)

    def _take_row(self, seq: Sequence) -> None:
        seq.row = self._free_rows.pop()
        seq.state = SequenceState.PREFILLING
        insort(self.running, seq, key=_key)
        insort(self._prefilling, seq, key=_key)
        request = seq.request
        self._admitted.append(
            AdmittedSequence(
                row=seq.row,
                request_id=seq.request_id,
                token_ids=tuple(seq.token_ids),
                num_prompt_tokens=seq.num_prompt_tokens,
                block_ids=tuple(seq.block_ids),
                num_computed_tokens=seq.num_computed_tokens,
                params=request.params,
                seed=request.seed,
                handoff_id=seq.request_id if request.phase is Phase.PREFILL else "",
            )
        )

    def _preempt(self, seq: Sequence) -> None:
        if seq.state is SequenceState.COMMITTED:
            _remove(self.committed, seq)
        else:
            self._leave_row(seq)
        self.pool.free(seq.forget_kv())
        seq.state = SequenceState.WAITING
        insort(self.waiting, seq, key=_key)
        self._preempted.append(seq)
        self.num_preemptions += 1

    def _leave_row(self, seq: Sequence) -> None:
        self._leave_lists(seq)
        self._give_back_row(seq)

    def _leave_lists(self, seq: Sequence) -> None:
        _remove(self.running, seq)
        if seq.state is SequenceState.PREFILLING:
            _remove(self._prefilling, seq)
        self._order_is_stale = True

    def _give_back_row(self, seq: Sequence) -> None:
        self.table.ready[seq.row] = False
        self._free_rows.append(seq.row)
        self._released_rows.append(seq.row)
        seq.row = -1

    # -- books ---------------------------------------------------------------------------------------------------

    def num_leaked_blocks(self, live: Iterable[Sequence]) -> int:
        """Block references beyond those of live sequences and of those that end with a step in flight."""
        return self.pool.num_references - sum(len(seq.block_ids) for seq in (*live, *self._ending))

    def check_integrity(self, live: Collection[Sequence]) -> None:
        """Compare pool, queues, rows and tables with each other and with the live sequences.

        Raises:
            InternalError: naming what is broken.
        """
        self.pool.check_integrity([seq.block_ids for seq in (*live, *self._ending)])
        for name, queue, states in (
            ("waiting", self.waiting, {SequenceState.WAITING}),
            ("committed", self.committed, {SequenceState.COMMITTED}),
            ("running", self.running, {SequenceState.PREFILLING, SequenceState.DECODING}),
            ("prefilling", self._prefilling, {SequenceState.PREFILLING}),
        ):
            members = [seq for seq in live if seq.state in states]
            if sorted(members, key=_key) != queue:
                raise InternalError(f"the {name} queue does not hold exactly the sequences of that state, by key")
        holders = [*self.running, *self._ending]
        rows = [seq.row for seq in holders] + self._free_rows
        if sorted(rows) != list(range(self._max_num_seqs)):
            raise InternalError(f"rows are lost or shared: {sorted(rows)}")
        for seq in live:
            if (seq.row >= 0) != (seq.state in _RUNS):
                raise InternalError(f"request {seq.request_id} is {seq.state.name} with row {seq.row}")
            if seq.state is SequenceState.WAITING and seq.block_ids:
                raise InternalError(f"request {seq.request_id} waits, but holds blocks")
            if seq.state is SequenceState.DECODING:
                self._check_row(seq)
        if np.any(self.table.in_flight[self._free_rows]) or np.any(self.table.ready[self._free_rows]):
            raise InternalError("a free row is in flight or ready")

    def _check_row(self, seq: Sequence) -> None:
        table, row = self.table, seq.row
        expected = (seq.num_tokens, len(seq.block_ids) * self._block_size, seq.max_len, seq.token_ids[-1])
        found = (table.num_tokens[row], table.capacity[row], table.max_len[row], table.input_token[row])
        if expected != tuple(int(value) for value in found):
            raise InternalError(f"row {row} of request {seq.request_id} has {found}, the sequence has {expected}")
        if bool(table.ready[row]) == bool(table.in_flight[row]):
            raise InternalError(f"row {row} of request {seq.request_id} must be either ready or in flight")


def _remove(seqs: list[Sequence], seq: Sequence) -> None:
    index = bisect_left(seqs, seq.key, key=_key)
    if index == len(seqs) or seqs[index] is not seq:
        raise InternalError(f"request {seq.request_id} is not in the queue that its state {seq.state.name} names")
    del seqs[index]
