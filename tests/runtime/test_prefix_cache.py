from __future__ import annotations

import hashlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuseline.runtime.block_pool import BlockPool
from fuseline.runtime.prefix_cache import (
    MAX_RECENT_HASHES,
    PrefixCache,
    extend_prefix_hashes,
    prefix_hashes,
    prefix_salt,
    truncate_hash,
)
from fuseline.runtime.request import Request
from fuseline.runtime.sampling_params import SamplingParams
from fuseline.runtime.sequence import Sequence

token_lists = st.lists(st.integers(0, 2**31 - 1), max_size=40)


def sequence(
    tokens: tuple[int, ...], *, name: str = "r", salt: str = "", prompt_logprobs: int | None = None
) -> Sequence:
    request = Request(name, tokens, SamplingParams(prompt_logprobs=prompt_logprobs), cache_salt=salt)
    return Sequence(request, arrival=0, arrival_s=0.0, max_total_tokens=10_000, eos_token_ids=frozenset())


def cache_of(num_blocks: int, block_size: int = 4, *, enabled: bool = True) -> tuple[BlockPool, PrefixCache]:
    pool = BlockPool(num_blocks)
    return pool, PrefixCache(pool, block_size, "f00d", enabled=enabled)


def computed(pool: BlockPool, cache: PrefixCache, seq: Sequence) -> None:
    """Give a sequence blocks and register all of them that are full."""
    seq.block_ids = pool.allocate(seq.num_tokens // 4 + 1)
    cache.register(seq, seq.num_tokens)


def test_the_hash_is_what_it_is_documented_to_be() -> None:
    root = hashlib.sha256(b"salt").digest()
    first = hashlib.sha256(root + struct.pack("<2i", 7, 300)).digest()
    second = hashlib.sha256(first + struct.pack("<2i", 1, 2)).digest()
    assert prefix_hashes((7, 300, 1, 2, 9), 2, b"salt") == [first, second]
    assert truncate_hash(first) == struct.unpack("<Q", first[:8])[0]


@given(token_lists, st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_equal_hashes_exactly_for_equal_prefixes(tokens: list[int], block_size: int) -> None:
    hashes = prefix_hashes(tokens, block_size, b"s")
    assert len(hashes) == len(set(hashes)) == len(tokens) // block_size
    assert prefix_hashes([*tokens, 5], block_size, b"s")[: len(hashes)] == hashes
    if hashes:
        changed = [tokens[0] ^ 1, *tokens[1:]]
        assert not set(hashes) & set(prefix_hashes(changed, block_size, b"s"))
        assert not set(hashes) & set(prefix_hashes(tokens, block_size, b"t"))


@given(token_lists, st.integers(0, 40), st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_hashes_made_piece_by_piece_are_the_same(tokens: list[int], cut: int, block_size: int) -> None:
    hashes = prefix_hashes(tokens[:cut], block_size, b"s")
    assert extend_prefix_hashes(hashes, tokens, block_size, b"s") == prefix_hashes(tokens, block_size, b"s")


def test_salts_do_not_run_into_each_other() -> None:
    assert prefix_salt("ab", "c") != prefix_salt("a", "bc")


def test_a_prompt_finds_the_blocks_of_an_equal_prefix() -> None:
    pool, cache = cache_of(16)
    first = sequence(tuple(range(13)))
    computed(pool, cache, first)
    assert cache.match(sequence((*range(9), 77, 78, 79, 80))) == first.block_ids[:2]
    assert cache.match(sequence((99, *range(1, 12)))) == []


@pytest.mark.parametrize(("num_tokens", "num_found"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_one_token_is_left_to_compute(num_tokens: int, num_found: int) -> None:
    pool, cache = cache_of(16)
    computed(pool, cache, sequence(tuple(range(12))))
    assert len(cache.match(sequence(tuple(range(num_tokens))))) == num_found


def test_tenants_do_not_see_each_other() -> None:
    pool, cache = cache_of(16)
    computed(pool, cache, sequence(tuple(range(9)), salt="a"))
    assert cache.match(sequence(tuple(range(9)), salt="b")) == []
    assert len(cache.match(sequence(tuple(range(9)), salt="a"))) == 2


def test_prompt_logprobs_need_every_position_computed() -> None:
    pool, cache = cache_of(16)
    computed(pool, cache, sequence(tuple(range(9))))
    seq = sequence(tuple(range(9)), prompt_logprobs=0)
    assert cache.match(seq) == []
    seq.prompt_logprobs = None  # delivered
    assert len(cache.match(seq)) == 2


def test_a_disabled_cache_neither_registers_nor_finds_nor_counts() -> None:
    pool, cache = cache_of(16, enabled=False)
    seq = sequence(tuple(range(9)))
    computed(pool, cache, seq)
    cache.count(seq, 0)
    assert cache.match(sequence(tuple(range(9)))) == []
    assert cache.num_query_tokens == 0
    assert cache.recent_hashes() == ()


def test_a_hole_ends_the_match() -> None:
    pool, cache = cache_of(4)
    seq = sequence(tuple(range(13)))
    computed(pool, cache, seq)
    pool.free(seq.block_ids)
    pool.allocate(2)  # the blank one, and the tail's
    assert len(cache.match(sequence(tuple(range(13))))) == 2


def test_recent_hashes_are_truncated_bounded_cached_ones_most_recent_first() -> None:
    pool, cache = cache_of(MAX_RECENT_HASHES + 100)
    big = sequence(tuple(range(4 * (MAX_RECENT_HASHES + 20))))
    computed(pool, cache, big)
    expected = [truncate_hash(block_hash) for block_hash in reversed(big.block_hashes)]
    assert list(cache.recent_hashes()) == expected[:MAX_RECENT_HASHES]
    small = sequence((5,) * 8, name="small")
    computed(pool, cache, small)
    again = sequence(tuple(range(9)), name="again")
    cache.count(again, 4 * len(cache.match(again)))
    found = cache.recent_hashes()
    assert len(found) == MAX_RECENT_HASHES
    assert list(found[:4]) == [truncate_hash(h) for h in (big.block_hashes[1], big.block_hashes[0])] + [
        truncate_hash(h) for h in reversed(small.block_hashes)
    ]
    assert (cache.num_query_tokens, cache.num_hit_tokens) == (9, 8)


def test_a_prefix_that_is_found_again_is_recent_again() -> None:
    pool, cache = cache_of(8)
    first, second = sequence((1,) * 4, name="first"), sequence((2,) * 4, name="second")
    computed(pool, cache, first)
    computed(pool, cache, second)
    again = sequence((1,) * 5, name="again")
    cache.count(again, 4 * len(cache.match(again)))
    expected = [truncate_hash(seq.block_hashes[0]) for seq in (first, second)]
    assert list(cache.recent_hashes()) == expected


def test_evicted_prefixes_are_not_advertised() -> None:
    pool, cache = cache_of(3)
    seq = sequence(tuple(range(8)))
    computed(pool, cache, seq)
    assert len(cache.recent_hashes()) == 2
    pool.free(seq.block_ids)
    pool.allocate(3)
    assert cache.recent_hashes() == ()
