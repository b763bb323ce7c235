"""What an engine tells its surroundings about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reserved:
    """Room for a request whose KV comes from elsewhere.

    Attributes:
        num_cached_tokens: leading prompt tokens, whole blocks, whose KV is here already.
        block_ids: the whole block table; the cached ones come first and must not be written.
    """

    num_cached_tokens: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot; counters count from the engine's start.

    Attributes:
        num_running: sequences with a row.
        num_waiting: sequences that wait for a row, with or without blocks.
        num_reserved: reservations not yet committed.
        num_held: prefills that wait to be released, and handoffs that expired and may still be touched.
        num_queued_tokens: known tokens of waiting and prefilling sequences that no step has taken up yet.
        num_free_blocks: cached blocks that nobody uses count as free.
        num_finished: requests that ended here, for whatever reason, completed handoffs included.
        num_leaked_blocks: block references that no sequence accounts for; anything but 0 is a bug.
        recent_prefix_hashes: truncated hashes of cached prefixes in use lately, most recent first, at most 1024.
    """

    num_running: int
    num_waiting: int
    num_reserved: int
    num_held: int
    num_queued_tokens: int
    num_total_blocks: int
    num_free_blocks: int
    num_steps: int
    num_finished: int
    num_preemptions: int
    num_generated_tokens: int
    num_prefix_cache_query_tokens: int
    num_prefix_cache_hit_tokens: int
    num_leaked_blocks: int
    recent_prefix_hashes: tuple[int, ...]
