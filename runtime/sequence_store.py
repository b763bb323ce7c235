"""The live sequences of an engine by state, with the rows and blocks that they hold.

Moves sequences between the states that runtime/sequence.py draws, and keeps the books; what moves when is decided
elsewhere. A sequence with a step in flight keeps row and blocks until that step is collected, even when it has ended:
neither the ranks nor a KV transfer into reused blocks must meet it there.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from .block_pool import BlockPool
from .config import EngineConfig
from .errors import InternalError
from .plan import AdmittedSequence
from .prefix_cache import PrefixCache
from .request import Phase
from .sequence import RowTable, Sequence, SequenceState

_RUNS = frozenset({SequenceState.PREFILLING, SequenceState.DECODING})
_key = attrgetter("key")


class SequenceStore:
    """Queues, rows and blocks. Read the attributes; change them through the methods.

    Attributes:
        sequences: by request id; all that hold something or wait.
        waiting: sorted by key, as are the three below; no row, no blocks.
        committed: blocks with the prompt's KV, no row.
        running: row and blocks; PREFILLING or DECODING.
        prefilling: those of them.
        num_free_rows: rows that nobody holds.
        num_preemptions: since the start.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.block_size = config.cache.block_size
        self.pool = BlockPool(config.cache.num_blocks)
        self.cache = PrefixCache(
            self.pool, self.block_size, config.model.fingerprint, enabled=config.cache.enable_prefix_caching
        )
        self.table = RowTable(config.scheduler.max_num_seqs)
        self.sequences: dict[str, Sequence] = {}
        self.waiting: list[Sequence] = []
        self.committed: list[Sequence] = []
        self.running: list[Sequence] = []
        self.prefilling: list[Sequence] = []
        self.num_preemptions = 0
        self._free_rows = list(range(config.scheduler.max_num_seqs - 1, -1, -1))
        self._ending: list[Sequence] = []  # ended, but with a step in flight
        self._released_rows: list[int] = []
        self._admitted: list[AdmittedSequence] = []
        self._untold_handoffs: set[Sequence] = set()
        self._order_is_stale = False
        self._order_rows: NDArray[np.intp] = np.empty(0, np.intp)
        self._order_seqs: list[Sequence] = []

    @property
    def num_free_rows(self) -> int:
        """Rows that nobody holds."""
        return len(self._free_rows)

    @property
    def has_ending(self) -> bool:
        """Whether sequences have ended that are part of a step not collected yet."""
        return bool(self._ending)

    @property
    def has_untold_handoffs(self) -> bool:
        """Whether a live Phase.PREFILL sequence was preempted since ``take_changes``."""
        return bool(self._untold_handoffs)

    def decoding(self) -> tuple[NDArray[np.intp], list[Sequence]]:
        """Rows and sequences that are DECODING, by key. Shared until the set changes: not to be written to."""
        if self._order_is_stale:
            self._order_seqs = [seq for seq in self.running if seq.state is SequenceState.DECODING]
            self._order_rows = np.array([seq.row for seq in self._order_seqs], np.intp)
            self._order_is_stale = False
        return self._order_rows, self._order_seqs

    def num_blocks_for(self, seq: Sequence) -> int:
        """Blocks for its known tokens and the next one."""
        return seq.num_tokens // self.block_size + 1

    # -- from state to state -------------------------------------------------------------------------------------

    def add_waiting(self, seq: Sequence) -> None:
        """A new sequence queues."""
        self.sequences[seq.request_id] = seq
        insort(self.waiting, seq, key=_key)

    def add_reserved(self, seq: Sequence, found: list[int]) -> None:
        """A new sequence takes blocks; needs as many free ones as ``num_blocks_for`` says beyond ``found``."""
        self.sequences[seq.request_id] = seq
        self._take_blocks(seq, found)

    def commit(self, seq: Sequence) -> None:
        """A RESERVED sequence has its prompt's KV and queues for a row."""
        seq.state = SequenceState.COMMITTED
        insort(self.committed, seq, key=_key)

    def admit(self, seq: Sequence, found: list[int]) -> None:
        """A WAITING or COMMITTED sequence takes a free row; a waiting one also its blocks, see ``add_reserved``."""
        if seq.state is SequenceState.COMMITTED:
            _remove(self.committed, seq)
        else:
            self._take_blocks(seq, found)
            _remove(self.waiting, seq)
        seq.row = self._free_rows.pop()
        seq.state = SequenceState.PREFILLING
        insort(self.running, seq, key=_key)
        insort(self.prefilling, seq, key=_key)
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

    def grow(self, seq: Sequence) -> int:
        """A DECODING sequence takes a block; one must be free."""
        block = self.pool.allocate(1)[0]
        seq.block_ids.append(block)
        self.table.capacity[seq.row] += self.block_size
        return block

    def start_decoding(self, seq: Sequence) -> None:
        """A PREFILLING sequence has got its token and goes on."""
        _remove(self.prefilling, seq)
        seq.state = SequenceState.DECODING
        self.table.start_decoding(seq, self.block_size)
        self._order_is_stale = True

    def hold(self, seq: Sequence) -> None:
        """A PREFILLING sequence has got its token and is handed off: it gives up its row and keeps its blocks."""
        self._leave_queues(seq)
        self._give_back_row(seq)
        seq.state = SequenceState.HELD

    def preempt(self, seq: Sequence) -> None:
        """A running sequence without a step in flight, or a COMMITTED one, loses what it holds and queues anew."""
        self._leave_queues(seq)
        if seq.row >= 0:
            self._give_back_row(seq)
        self.pool.free(seq.forget_kv())
        seq.state = SequenceState.WAITING
        insort(self.waiting, seq, key=_key)
        self.num_preemptions += 1
        if seq.request.phase is Phase.PREFILL:
            self._untold_handoffs.add(seq)

    def expire(self, seq: Sequence) -> None:
        """A RESERVED or HELD sequence ends; its blocks stay until ``release``."""
        seq.state = SequenceState.EXPIRED

    def release(self, seq: Sequence) -> None:
        """End a sequence in any state; rows and blocks come home, after the steps in flight that it is part of."""
        self._leave_queues(seq)
        if seq.row >= 0 and self.table.in_flight[seq.row]:
            self._ending.append(seq)
        else:
            self._come_home(seq)
        seq.state = SequenceState.FINISHED
        self._untold_handoffs.discard(seq)
        del self.sequences[seq.request_id]

    # -- steps ---------------------------------------------------------------------------------------------------

    def take_changes(self) -> tuple[tuple[int, ...], tuple[AdmittedSequence, ...]]:
        """Rows released and sequences admitted since the last call, for the ranks."""
        changes = tuple(self._released_rows), tuple(self._admitted)
        self._released_rows, self._admitted = [], []
        self._untold_handoffs.clear()
        return changes

    def submitted(self, rows: NDArray[np.intp]) -> None:
        """A step with these rows, each once, is on its way."""
        self.table.in_flight[rows] += 1

    def collected(self, rows: NDArray[np.intp]) -> None:
        """It is back, and its tokens have been taken up."""
        self.table.in_flight[rows] -= 1
        if self._ending:
            for seq in self._ending:
                if not self.table.in_flight[seq.row]:
                    self._come_home(seq)
            self._ending = [seq for seq in self._ending if seq.row >= 0]

    def forget_steps(self) -> None:
        """No step is on its way any more, and none will come back: the ranks are gone."""
        self.table.in_flight[:] = 0
        self.collected(np.empty(0, np.intp))

    # -- books ---------------------------------------------------------------------------------------------------

    def num_leaked_blocks(self) -> int:
        """Block references beyond those of live sequences and of those that end with a step in flight."""
        holders = (*self.sequences.values(), *self._ending)
        return self.pool.num_references - sum(len(seq.block_ids) for seq in holders)

    def check_integrity(self) -> None:
        """Compare pool, queues, rows and tables with each other and with the sequences.

        Raises:
            InternalError: naming what is broken.
        """
        live = self.sequences.values()
        self.pool.check_integrity([seq.block_ids for seq in (*live, *self._ending)])
        for name, queue, states in (
            ("waiting", self.waiting, {SequenceState.WAITING}),
            ("committed", self.committed, {SequenceState.COMMITTED}),
            ("running", self.running, _RUNS),
            ("prefilling", self.prefilling, {SequenceState.PREFILLING}),
        ):
            if sorted((seq for seq in live if seq.state in states), key=_key) != queue:
                raise InternalError(f"the {name} queue does not hold exactly the sequences of that state, by key")
        rows = [seq.row for seq in (*self.running, *self._ending)] + self._free_rows
        if sorted(rows) != list(range(len(self.table.ready))):
            raise InternalError(f"rows are lost or shared: {sorted(rows)}")
        for seq in live:
            if (seq.row >= 0) != (seq.state in _RUNS) or seq.state is SequenceState.FINISHED:
                raise InternalError(f"request {seq.request_id} is {seq.state.name} with row {seq.row}")
            if bool(seq.block_ids) == (seq.state is SequenceState.WAITING):
                raise InternalError(f"request {seq.request_id} is {seq.state.name} with blocks {seq.block_ids}")
            if seq.state is SequenceState.DECODING:
                self._check_row(seq)
        if np.any(self.table.in_flight[self._free_rows]) or np.any(self.table.ready[self._free_rows]):
            raise InternalError("a free row is in flight or ready")

    def _check_row(self, seq: Sequence) -> None:
        table, row = self.table, seq.row
        expected = (seq.num_tokens, len(seq.block_ids) * self.block_size, seq.max_len, seq.token_ids[-1])
        columns = (table.num_tokens, table.capacity, table.max_len, table.input_token)
        found = tuple(int(column[row]) for column in columns)
        if expected != found:
            raise InternalError(f"row {row} of request {seq.request_id} has {found}, the sequence has {expected}")
        if bool(table.ready[row]) == bool(table.in_flight[row]):
            raise InternalError(f"row {row} of request {seq.request_id} must be either ready or in flight")

    # -- inside --------------------------------------------------------------------------------------------------

    def _take_blocks(self, seq: Sequence, found: list[int]) -> None:
        self.pool.share(found)  # before the others are allocated, which may evict
        seq.block_ids = found + self.pool.allocate(self.num_blocks_for(seq) - len(found))
        seq.num_registered_blocks = len(found)
        seq.num_computed_tokens = len(found) * self.block_size
        if seq.is_first_admission:
            seq.is_first_admission = False
            seq.num_cached_tokens = seq.num_computed_tokens
            self.cache.count(seq, seq.num_cached_tokens)

    def _leave_queues(self, seq: Sequence) -> None:
        if seq.state is SequenceState.WAITING:
            _remove(self.waiting, seq)
        elif seq.state is SequenceState.COMMITTED:
            _remove(self.committed, seq)
        elif seq.state in _RUNS:
            _remove(self.running, seq)
            if seq.state is SequenceState.PREFILLING:
                _remove(self.prefilling, seq)
            else:
                self._order_is_stale = True

    def _give_back_row(self, seq: Sequence) -> None:
        self.table.ready[seq.row] = False
        self._free_rows.append(seq.row)
        self._released_rows.append(seq.row)
        seq.row = -1

    def _come_home(self, seq: Sequence) -> None:
        if seq.row >= 0:
            self._give_back_row(seq)
        self.pool.free(seq.forget_kv())


def _remove(seqs: list[Sequence], seq: Sequence) -> None:
    index = bisect_left(seqs, seq.key, key=_key)
    if index == len(seqs) or seqs[index] is not seq:
        raise InternalError(f"request {seq.request_id} is not in the queue that its state {seq.state.name} names")
    del seqs[index]
