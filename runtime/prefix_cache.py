"""Prefix caching: full blocks are named by chained SHA-256 hashes, so that equal prompts share their KV.

The hash of a block covers its tokens and, through its parent's hash, everything before it, and starts from a salt:
the model's fingerprint and the request's ``cache_salt``. Finding a block by its hash therefore means that every
token up to its end is the same, for the same model and tenant. SHA-256 makes a collision, even one sought on
purpose, nothing to plan for.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Sequence as Seq
from itertools import islice
from typing import TYPE_CHECKING

from .block_pool import BlockPool

if TYPE_CHECKING:
    from .sequence import Sequence

MAX_RECENT_HASHES = 1024


def prefix_salt(model_fingerprint: str, cache_salt: str) -> bytes:
    """The salt that a worker serving this model uses for a request; routers use the same to predict its hashes."""
    return f"{model_fingerprint}\0{cache_salt}".encode()


def prefix_hashes(token_ids: Seq[int], block_size: int, salt: bytes) -> list[bytes]:
    """Chained hashes of the full blocks of ``token_ids``, one per block, 32 bytes each."""
    return extend_prefix_hashes([], token_ids, block_size, salt)


def extend_prefix_hashes(hashes: list[bytes], token_ids: Seq[int], block_size: int, salt: bytes) -> list[bytes]:
    """Append the hashes of full blocks that ``hashes`` lacks, in place; returns it."""
    start, end = len(hashes), len(token_ids) // block_size
    if start >= end:
        return hashes
    data = struct.pack(f"<{(end - start) * block_size}i", *token_ids[start * block_size : end * block_size])
    size = block_size * 4
    parent = hashes[-1] if hashes else hashlib.sha256(salt).digest()
    for offset in range(0, len(data), size):
        parent = hashlib.sha256(parent + data[offset : offset + size]).digest()
        hashes.append(parent)
    return hashes


def truncate_hash(block_hash: bytes) -> int:
    """The first 8 bytes, little-endian: enough for a router's guess, never for sharing KV."""
    return int.from_bytes(block_hash[:8], "little")


class PrefixCache:
    """Finds and registers the full blocks of sequences in a pool. Eviction is the pool's.

    Attributes:
        num_query_tokens: prompt tokens that were looked up.
        num_hit_tokens: those of them that were found.
    """

    def __init__(self, pool: BlockPool, block_size: int, model_fingerprint: str, *, enabled: bool) -> None:
        self._pool = pool
        self._block_size = block_size
        self._fingerprint = model_fingerprint
        self._enabled = enabled
        self._recent: OrderedDict[bytes, int] = OrderedDict()  # most recent last
        self.num_query_tokens = 0
        self.num_hit_tokens = 0

    def match(self, seq: Sequence) -> list[int]:
        """Blocks that hold the sequence's leading tokens, none of them referenced yet for it.

        At least one token is left to compute, because its logits are needed. A request for prompt logprobs needs
        all of them, so it finds nothing until it has them.
        """
        if not self._enabled or seq.wants_prompt_logprobs:
            return []
        hashes = self.hashes(seq)
        found = []
        lookup = self._pool.lookup
        for block_hash in islice(hashes, (seq.num_tokens - 1) // self._block_size):
            block = lookup(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def hashes(self, seq: Sequence) -> list[bytes]:
        """Hashes of all the sequence's full blocks, computed once each and kept with it."""
        salt = b"" if seq.block_hashes else prefix_salt(self._fingerprint, seq.request.cache_salt)
        return extend_prefix_hashes(seq.block_hashes, seq.token_ids, self._block_size, salt)

    def count(self, seq: Sequence, num_hit_tokens: int) -> None:
        """Note the outcome of a sequence's first lookup."""
        if self._enabled and not seq.wants_prompt_logprobs:
            self.num_query_tokens += seq.num_prompt_tokens
            self.num_hit_tokens += num_hit_tokens
            self._touch(seq.block_hashes[: num_hit_tokens // self._block_size])

    def register(self, seq: Sequence, num_computed_tokens: int) -> None:
        """Make the sequence's full blocks findable whose KV is computed for all tokens."""
        if not self._enabled:
            return
        first, end = seq.num_registered_blocks, num_computed_tokens // self._block_size
        if first >= end:
            return
        hashes = self.hashes(seq)
        for index in range(first, end):
            self._pool.register(seq.block_ids[index], hashes[index])
        seq.num_registered_blocks = end
        self._touch(hashes[first:end])

    def recent_hashes(self) -> tuple[int, ...]:
        """Truncated hashes of cached blocks in use lately, most recent first, at most ``MAX_RECENT_HASHES``."""
        lookup = self._pool.lookup
        return tuple(short for full, short in reversed(self._recent.items()) if lookup(full) is not None)

    def _touch(self, hashes: Seq[bytes]) -> None:
        recent = self._recent
        for block_hash in hashes[-MAX_RECENT_HASHES:]:
            if block_hash in recent:
                recent.move_to_end(block_hash)
            else:
                recent[block_hash] = truncate_hash(block_hash)
                if len(recent) > MAX_RECENT_HASHES:
                    recent.popitem(last=False)
