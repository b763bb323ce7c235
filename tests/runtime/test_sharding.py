"""The arithmetic that weights, KV cache and transfer all cut by: every piece exactly once, nothing beside it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuseline.runtime.errors import InvalidArgumentError, ModelFormatError
from fuseline.runtime.sharding import (
    KvRange,
    ModelShape,
    ParallelConfig,
    check_shardable,
    kv_range,
    split_evenly,
    vocab_range,
)


def shape(num_layers: int = 4, num_heads: int = 8, num_kv_heads: int = 2, intermediate_size: int = 64) -> ModelShape:
    return ModelShape(num_layers, num_heads, num_kv_heads, 16, num_heads * 16, intermediate_size, 100)


@given(st.integers(0, 1000), st.integers(1, 64))
def test_split_evenly_covers_everything_once_and_in_order(total: int, parts: int) -> None:
    pieces = [split_evenly(total, parts, index) for index in range(parts)]
    assert [position for start, end in pieces for position in range(start, end)] == list(range(total))
    sizes = [end - start for start, end in pieces]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 16), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4]))
def test_every_layer_and_head_lives_on_as_many_ranks_as_replicas(layers: int, heads: int, tp: int, pp: int) -> None:
    if layers < pp:
        return
    model, parallel = shape(layers, 8, heads), ParallelConfig(tp, pp)
    holders = dict.fromkeys(((layer, head) for layer in range(layers) for head in range(heads)), 0)
    for rank in range(parallel.world_size):
        held = kv_range(model, parallel, rank)
        assert held.num_heads == max(1, heads // tp)
        for layer in range(held.layer_start, held.layer_end):
            for head in range(held.head_start, held.head_end):
                holders[layer, head] += 1
    assert set(holders.values()) == {max(1, tp // heads)}


def test_intersection_is_the_common_rectangle_or_none() -> None:
    assert KvRange(0, 4, 0, 2).intersect(KvRange(2, 6, 1, 3)) == KvRange(2, 4, 1, 2)
    assert KvRange(0, 2, 0, 2).intersect(KvRange(2, 4, 0, 2)) is None
    assert KvRange(0, 2, 0, 2).intersect(KvRange(0, 2, 2, 4)) is None


def test_vocabulary_is_split_though_it_does_not_divide() -> None:
    assert [vocab_range(10, 4, rank) for rank in range(4)] == [(0, 3), (3, 6), (6, 8), (8, 10)]


@pytest.mark.parametrize(
    ("model", "parallel", "numbers"),
    [
        (shape(num_heads=6, num_kv_heads=2), ParallelConfig(4), ("6", "4", "num_attention_heads")),
        (shape(intermediate_size=66), ParallelConfig(4), ("66", "4", "intermediate_size")),
        (shape(num_heads=12, num_kv_heads=6), ParallelConfig(4), ("6", "4", "num_key_value_heads")),
        (shape(num_layers=3), ParallelConfig(1, 4), ("3", "4", "num_hidden_layers")),
    ],
)
def test_a_shape_that_cannot_be_cut_is_refused_with_its_numbers(
    model: ModelShape, parallel: ParallelConfig, numbers: tuple[str, ...]
) -> None:
    with pytest.raises(ModelFormatError) as caught:
        check_shardable(model, parallel)
    assert all(number in str(caught.value) for number in numbers)


@pytest.mark.parametrize("size", [0, -1, 65])
def test_parallel_sizes_out_of_range_are_refused(size: int) -> None:
    with pytest.raises(InvalidArgumentError, match=str(size)):
        ParallelConfig(tensor_parallel_size=size)
    with pytest.raises(InvalidArgumentError, match=str(size)):
        ParallelConfig(pipeline_parallel_size=size)
