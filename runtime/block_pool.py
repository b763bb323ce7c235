"""Paged KV block accounting: who refers to which block, which free blocks still hold a cached prefix.

Every block is in exactly one of three places:

    in use          references > 0; may also be cached, then prefix-cache hits share it
    free, cached    references == 0; keeps its hash until it is evicted, least recently freed first
    free, blank     references == 0; nothing worth keeping

    allocate: blank -> in use, else the oldest cached one loses its hash -> in use
    share:    in use, or free and cached -> in use with one more reference
    free:     in use -> in use with one less, at zero -> cached or blank

Only numbers live here; the bytes belong to the ranks. All operations cost O(1) per block.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Sequence

from .errors import InternalError, ResourceExhaustedError


class BlockPool:
    """The blocks ``0 .. num_blocks - 1`` of one group.

    Attributes:
        num_references: sum of all references; a sequence that holds a block holds one of them.
        num_evictions: cached blocks that lost their content to make room.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_references = 0
        self.num_evictions = 0
        self._references = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._blank = list(range(num_blocks - 1, -1, -1))  # a stack; low ids first
        self._cached_free: OrderedDict[int, None] = OrderedDict()  # oldest first

    @property
    def num_free(self) -> int:
        """Blocks that ``allocate`` could give out now; cached ones that nobody uses count."""
        return len(self._blank) + len(self._cached_free)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks with unspecified content, each with one reference; evicts cached ones when it must.

        Raises:
            ResourceExhaustedError: fewer are free; then nothing is taken.
        """
        if num_blocks > self.num_free:
            raise ResourceExhaustedError(
                f"{num_blocks} KV blocks are needed, {self.num_free} of {self.num_blocks} are free",
                field="num_blocks",
                value=num_blocks,
                limit=self.num_free,
            )
        blank, references = self._blank, self._references
        taken = []
        for _ in range(num_blocks):
            block = blank.pop() if blank else self._evict()
            references[block] = 1
            taken.append(block)
        self.num_references += num_blocks
        return taken

    def share(self, block_ids: Sequence[int]) -> None:
        """Add a reference to blocks that are in use or cached."""
        for block in block_ids:
            if self._references[block] == 0:
                if block not in self._cached_free:
                    raise InternalError(f"block {block} is blank and cannot be shared")
                del self._cached_free[block]
            self._references[block] += 1
        self.num_references += len(block_ids)

    def free(self, block_ids: Sequence[int]) -> None:
        """Drop one reference to each block of a block table.

        The last block goes first, so that of a prefix nobody uses the tail is evicted before the head.

        Raises:
            InternalError: a block has no reference.
        """
        for block in reversed(block_ids):
            left = self._references[block] - 1
            if left < 0:
                raise InternalError(f"block {block} is freed but nobody refers to it")
            self._references[block] = left
            if left == 0:
                if self._hashes[block] is None:
                    self._blank.append(block)
                else:
                    self._cached_free[block] = None
        self.num_references -= len(block_ids)

    def register(self, block: int, block_hash: bytes) -> None:
        """Say that a block in use holds the content named by ``block_hash``, from now until it is evicted.

        When another block holds the same content already, that one stays the cached one.
        """
        if block_hash in self._block_of:
            return
        if self._references[block] == 0 or self._hashes[block] is not None:
            raise InternalError(f"block {block} cannot be registered: it is free or has a hash")
        self._block_of[block_hash] = block
        self._hashes[block] = block_hash

    def lookup(self, block_hash: bytes) -> int | None:
        """The block that holds this content, in use or free."""
        return self._block_of.get(block_hash)

    def num_unused(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks are free: sharing them makes ``num_free`` smaller."""
        references = self._references
        return sum(1 for block in block_ids if references[block] == 0)

    def num_freed_by(self, block_tables: Iterable[Sequence[int]], *, except_for: Collection[int]) -> int:
        """By how much ``num_free`` would grow if these tables were freed and the blocks of ``except_for`` kept."""
        dropped = Counter(block for table in block_tables for block in table)
        for block in except_for:
            dropped.pop(block, None)
        references = self._references
        return sum(1 for block, count in dropped.items() if references[block] == count)

    def _evict(self) -> int:
        block, _ = self._cached_free.popitem(last=False)
        block_hash = self._hashes[block]
        if block_hash is None:
            raise InternalError(f"block {block} is among the cached ones without a hash")
        del self._block_of[block_hash]
        self._hashes[block] = None
        self.num_evictions += 1
        return block

    def check_integrity(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Compare the books with each other and with what sequences hold. O(num_blocks), for tests and idle times.

        Raises:
            InternalError: naming the block and what is wrong with it.
        """
        held = Counter(block for table in block_tables for block in table)
        blank = Counter(self._blank)
        for block in range(self.num_blocks):
            references, block_hash = self._references[block], self._hashes[block]
            if references != held[block]:
                raise InternalError(f"block {block} has {references} references, sequences hold {held[block]}")
            places = blank[block] + (block in self._cached_free) + (references > 0)
            if places != 1:
                raise InternalError(f"block {block} is in {places} places instead of one")
            if block_hash is None and block in self._cached_free:
                raise InternalError(f"block {block} is among the cached ones without a hash")
            if block_hash is not None and blank[block]:
                raise InternalError(f"block {block} is blank but has a hash")
            if block_hash is not None and self._block_of.get(block_hash) != block:
                raise InternalError(f"block {block} has a hash that names block {self._block_of.get(block_hash)}")
        if len(self._block_of) != sum(block_hash is not None for block_hash in self._hashes):
            raise InternalError("there are hashes that name no block")
        if self.num_references != held.total():
            raise InternalError(f"{self.num_references} references are counted, sequences hold {held.total()}")
        if len(self._blank) + len(self._cached_free) + sum(r > 0 for r in self._references) != self.num_blocks:
            raise InternalError("blocks are counted twice or lost")
