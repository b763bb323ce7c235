from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuseline.runtime.block_pool import BlockPool
from fuseline.runtime.errors import InternalError, ResourceExhaustedError


def test_every_block_is_given_out_once_and_none_beyond() -> None:
    pool = BlockPool(5)
    taken = pool.allocate(3) + pool.allocate(2)
    assert sorted(taken) == [0, 1, 2, 3, 4]
    with pytest.raises(ResourceExhaustedError, match="1 KV blocks are needed, 0 of 5 are free"):
        pool.allocate(1)
    pool.check_integrity([taken])


def test_a_refused_allocation_takes_nothing() -> None:
    pool = BlockPool(4)
    held = pool.allocate(3)
    with pytest.raises(ResourceExhaustedError):
        pool.allocate(2)
    assert pool.num_free == 1
    pool.check_integrity([held])


def test_a_shared_block_is_free_when_the_last_one_lets_go() -> None:
    pool = BlockPool(2)
    first = pool.allocate(1)
    pool.share(first)
    pool.free(first)
    assert pool.num_free == 1
    pool.free(first)
    assert pool.num_free == 2
    pool.check_integrity([])


def test_freeing_twice_is_a_bug_and_says_so() -> None:
    pool = BlockPool(1)
    block = pool.allocate(1)
    pool.free(block)
    with pytest.raises(InternalError, match="block 0 is freed but nobody refers to it"):
        pool.free(block)


def test_a_cached_block_is_found_until_it_is_evicted() -> None:
    pool = BlockPool(2)
    block = pool.allocate(1)
    pool.register(block[0], b"a")
    pool.free(block)
    assert pool.lookup(b"a") == block[0]
    assert pool.num_free == 2
    assert pool.num_unused(block) == 1
    pool.share(block)
    assert pool.num_unused(block) == 0
    pool.free(block)
    pool.allocate(2)
    assert pool.lookup(b"a") is None
    assert pool.num_evictions == 1


def test_blank_blocks_go_before_cached_ones_and_those_least_recently_freed_first_tails_before_heads() -> None:
    pool = BlockPool(5)
    old, new = pool.allocate(2), pool.allocate(2)
    for name, block in zip((b"old head", b"old tail", b"new head", b"new tail"), old + new, strict=True):
        pool.register(block, name)
    pool.free(old)
    pool.free(new)
    assert pool.allocate(1) == [4]
    evicted = []
    for _ in range(4):
        pool.allocate(1)
        names = (b"old head", b"old tail", b"new head", b"new tail")
        evicted.append({name for name in names if pool.lookup(name) is None})
    assert evicted == [
        {b"old tail"},
        {b"old tail", b"old head"},
        {b"old tail", b"old head", b"new tail"},
        {b"old tail", b"old head", b"new tail", b"new head"},
    ]


def test_using_a_cached_block_makes_it_recent() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(1), pool.allocate(1)
    pool.register(first[0], b"first")
    pool.register(second[0], b"second")
    pool.free(first)
    pool.free(second)
    pool.share(first)
    pool.free(first)
    pool.allocate(1)
    assert pool.lookup(b"second") is None
    assert pool.lookup(b"first") == first[0]


def test_the_first_holder_of_a_content_stays_the_cached_one() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    pool.register(blocks[0], b"same")
    pool.register(blocks[1], b"same")
    pool.free(blocks)
    assert pool.lookup(b"same") == blocks[0]
    pool.check_integrity([])


def test_what_freeing_several_tables_would_give() -> None:
    pool = BlockPool(8)
    shared, first, second, stays = pool.allocate(1), pool.allocate(2), pool.allocate(1), pool.allocate(1)
    tables = [shared + first, shared + second, stays]
    pool.share(shared)
    pool.share(stays)
    assert pool.num_freed_by(tables[:1], except_for=[]) == 2
    assert pool.num_freed_by(tables[:2], except_for=[]) == 4
    assert pool.num_freed_by(tables, except_for=[*first[:1], 7]) == 3


@pytest.mark.parametrize("use", [lambda pool: pool.share([1]), lambda pool: pool.register(1, b"x")])
def test_a_blank_block_can_be_neither_shared_nor_registered(use: Callable[[BlockPool], None]) -> None:
    with pytest.raises(InternalError, match="block 1"):
        use(BlockPool(2))


def broken_pool() -> tuple[BlockPool, list[list[int]]]:
    pool = BlockPool(4)
    used, cached = pool.allocate(1), pool.allocate(1)
    pool.register(cached[0], b"c")
    pool.free(cached)
    tables = [used]
    pool.check_integrity(tables)
    return pool, tables


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda pool: pool._references.__setitem__(0, 2), "block 0 has 2 references, sequences hold 1"),
        (lambda pool: pool._blank.append(0), "block 0 is in 2 places"),
        (lambda pool: pool._blank.remove(3), "block 3 is in 0 places"),
        (lambda pool: pool._blank.append(3), "block 3 is in 2 places"),
        (lambda pool: pool._cached_free.pop(1), "block 1 is in 0 places"),
        (lambda pool: pool._hashes.__setitem__(1, None), "block 1 is among the cached ones without a hash"),
        (lambda pool: pool._hashes.__setitem__(2, b"x"), "block 2 is blank but has a hash"),
        (lambda pool: pool._block_of.__setitem__(b"c", 0), "block 1 has a hash that names block 0"),
        (lambda pool: pool._block_of.__setitem__(b"z", 2), "hashes that name no block"),
        (lambda pool: setattr(pool, "num_references", 7), "7 references are counted, sequences hold 1"),
    ],
)
def test_the_integrity_check_names_the_damage(damage: Callable[[BlockPool], None], message: str) -> None:
    pool, tables = broken_pool()
    damage(pool)
    with pytest.raises(InternalError, match=message):
        pool.check_integrity(tables)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=60))
def test_the_books_agree_after_any_order_of_operations(operations: list[tuple[int, int]]) -> None:
    pool, tables, num_hashes = BlockPool(8), list[list[int]](), 0
    for kind, number in operations:
        if kind == 0 and number <= pool.num_free:
            tables.append(pool.allocate(number))
        elif kind == 1 and tables:
            pool.free(tables.pop(number % len(tables)))
        elif kind == 2 and tables:
            tables.append(list(tables[number % len(tables)]))
            pool.share(tables[-1])
        elif kind == 3 and tables and tables[-1] and pool._hashes[tables[-1][0]] is None:
            pool.register(tables[-1][0], str(num_hashes % (number + 1)).encode())
            num_hashes += 1
        pool.check_integrity(tables)
    for table in tables:
        pool.free(table)
    assert pool.num_free == 8
