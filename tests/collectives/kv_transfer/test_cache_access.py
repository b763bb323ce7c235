"""Both ways into a cache against plain indexing, token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuseline.collectives.kv_transfer.cache_access import (
    CacheAccess,
    DeviceCacheAccess,
    HostCacheAccess,
    cache_access,
)
from fuseline.runtime.errors import InvalidArgumentError
from fuseline.runtime.sharding import KvRange

RANGE = KvRange(3, 5, 2, 6)  # two layers, four heads, in the middle of a model
NUM_BLOCKS, BLOCK_SIZE, HEAD_DIM = 7, 4, 8


def make_cache(device: str = "cpu") -> torch.Tensor:
    shape = (RANGE.num_layers, 2, NUM_BLOCKS, RANGE.num_heads, BLOCK_SIZE, HEAD_DIM)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return values.to(device, torch.bfloat16)


def expected_piece(
    cache: torch.Tensor, layer: int, heads: tuple[int, int], tokens: range, blocks: list[int]
) -> torch.Tensor:
    per_token = [
        cache[layer - 3, :, blocks[t // BLOCK_SIZE], heads[0] - 2 : heads[1] - 2, t % BLOCK_SIZE] for t in tokens
    ]
    return torch.stack(per_token, dim=2).contiguous()  # [2, head, token, head_dim]


@settings(deadline=None)
@given(st.data())
@pytest.mark.parametrize("implementation", [HostCacheAccess, DeviceCacheAccess])
def test_gathers_and_scatters_any_range(
    implementation: type[HostCacheAccess | DeviceCacheAccess], data: st.DataObject
) -> None:
    blocks = data.draw(st.permutations(range(NUM_BLOCKS)))
    start, end = sorted(data.draw(st.lists(st.integers(0, 28), min_size=2, max_size=2, unique=True)))
    first, last = sorted(data.draw(st.lists(st.integers(2, 6), min_size=2, max_size=2, unique=True)))
    layer = data.draw(st.integers(3, 4))
    check_round_trip(implementation(make_cache(), RANGE), make_cache(), layer, (first, last), (start, end), blocks)


def check_round_trip(
    access: CacheAccess,
    cache: torch.Tensor,
    layer: int,
    heads: tuple[int, int],
    tokens: tuple[int, int],
    blocks: list[int],
) -> None:
    """Gather the range; overwrite it with other values; only it has changed."""
    expected = expected_piece(cache, layer, heads, range(*tokens), blocks)
    out = np.empty(expected.nbytes, np.uint8)
    access.gather(layer, heads, tokens, np.array(blocks), out)
    assert out.tobytes() == expected.view(torch.uint8).numpy().tobytes()
    access.scatter(layer, heads, tokens, np.array(blocks), (-expected).view(torch.uint8).numpy().reshape(-1))
    back = np.empty_like(out)
    access.gather(layer, heads, tokens, np.array(blocks), back)
    assert back.tobytes() == (-expected).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("implementation", [HostCacheAccess, DeviceCacheAccess])
def test_scatter_changes_nothing_else(implementation: type[HostCacheAccess | DeviceCacheAccess]) -> None:
    cache, blocks, tokens = make_cache(), [5, 6, 0, 2], (3, 14)
    before = cache.clone()
    access = implementation(cache, RANGE)
    piece = expected_piece(cache, 4, (3, 5), range(*tokens), blocks)
    access.scatter(4, (3, 5), tokens, np.array(blocks), (-piece).view(torch.uint8).numpy().reshape(-1))
    for token in range(*tokens):
        before[1, :, blocks[token // BLOCK_SIZE], 1:3, token % BLOCK_SIZE] *= -1
    assert torch.equal(cache, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    cache = make_cache("cuda")
    access = cache_access(cache, RANGE)
    assert isinstance(access, DeviceCacheAccess)
    ready = access.mark_written()
    assert ready is not None
    ready.synchronize()
    check_round_trip(access, make_cache(), 3, (2, 6), (1, 27), [6, 2, 3, 0, 1, 5, 4])


def test_refuses_what_is_no_cache_of_the_range() -> None:
    for tensor in (
        make_cache()[0],
        make_cache().transpose(3, 4),
        make_cache()[:1],
        make_cache()[:, :, :, :1].contiguous(),
    ):
        with pytest.raises(InvalidArgumentError):
            cache_access(tensor, RANGE)
