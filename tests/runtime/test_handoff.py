"""What each prefill rank sends where: over all ranks, every (layer, head) of every destination exactly once."""

import hashlib
from collections import Counter
from itertools import product

import pytest

from fuseline.runtime.handoff import RankEndpoint, token_prefix_hash, transfer_ranges
from fuseline.runtime.sharding import ModelShape, ParallelConfig, kv_range

SIZES = [ParallelConfig(tp, pp) for tp, pp in product((1, 2, 4), (1, 2, 4))]


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("source", SIZES, ids=str)
def test_every_destination_gets_everything_exactly_once(source: ParallelConfig, num_kv_heads: int) -> None:
    shape = ModelShape(6, 8, num_kv_heads, 16, 128, 256, 100)
    for destination in SIZES:
        endpoints = [
            RankEndpoint(rank, f"host:{rank}", "host", kv_range(shape, destination, rank))
            for rank in range(destination.world_size)
        ]
        sent: Counter[tuple[int, int, int]] = Counter()
        for rank in range(source.world_size):
            for endpoint, part in transfer_ranges(shape, source, rank, endpoints):
                layers, heads = range(part.layer_start, part.layer_end), range(part.head_start, part.head_end)
                sent.update((endpoint.rank, layer, head) for layer in layers for head in heads)
        wanted = {
            (endpoint.rank, layer, head)
            for endpoint in endpoints
            for layer in range(endpoint.kv_range.layer_start, endpoint.kv_range.layer_end)
            for head in range(endpoint.kv_range.head_start, endpoint.kv_range.head_end)
        }
        assert sent == Counter(wanted)


def test_the_prefix_hash_is_sha256_of_little_endian_int32() -> None:
    raw = b"\x01\x00\x00\x00\x00\x10\x00\x00"
    assert token_prefix_hash([1, 4096]) == hashlib.sha256(raw).digest()
    assert token_prefix_hash([4096, 1]) != token_prefix_hash([1, 4096])
