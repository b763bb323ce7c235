"""KV pools are sized by memory, and a pool that is too small is refused with the numbers."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import psutil
import pytest
import torch

from fuseline.kernels.cuda import fused
from fuseline.runtime.config import ModelInfo, SchedulerConfig
from fuseline.runtime.errors import ResourceExhaustedError
from fuseline.runtime.sharding import ModelShape, ParallelConfig
from fuseline.workers.memory import (
    CPU_MAX_BYTES,
    available_memory_bytes,
    kv_block_bytes,
    kv_budget_bytes,
    lazy_zeros,
    max_kv_blocks,
    step_workspace_bytes,
)

INFO = ModelInfo("m", "f", ModelShape(6, 8, 2, 64, 512, 1024, 1000), "bfloat16", 1000, (0,))
CPU = torch.device("cpu")
SCHEDULER = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64)


def test_block_bytes_are_those_of_the_rank() -> None:
    whole = 6 * 2 * 2 * 16 * 64 * 2  # layers, K and V, heads, tokens, head_dim, bytes
    assert kv_block_bytes(INFO, ParallelConfig(), 0, 16) == whole
    assert kv_block_bytes(INFO, ParallelConfig(2), 1, 16) == whole // 2
    assert kv_block_bytes(INFO, ParallelConfig(4), 3, 16) == whole // 2  # two KV heads on four ranks
    assert kv_block_bytes(INFO, ParallelConfig(1, 4), 3, 16) == whole // 6
    integers = replace(INFO, kv_cache_dtype="int8")
    assert kv_block_bytes(integers, ParallelConfig(), 0, 16) == whole // 2 + 6 * 2 * 2 * 16 * 4  # and a scale each


def test_blocks_fill_the_budget_but_not_more_than_can_be_used() -> None:
    block = kv_block_bytes(INFO, ParallelConfig(), 0, 16)
    assert max_kv_blocks(INFO, SCHEDULER, ParallelConfig(), 0, 16, 100 * block + 5) == 100
    assert max_kv_blocks(INFO, SCHEDULER, ParallelConfig(), 0, 16, 10**12) == 63 * 4
    with pytest.raises(
        ResourceExhaustedError, match=rf"needs {63 * block} bytes on rank 0, and there are {62 * block}"
    ):
        max_kv_blocks(INFO, SCHEDULER, ParallelConfig(), 0, 16, 62 * block)
    with pytest.raises(ResourceExhaustedError, match="there are 0"):
        max_kv_blocks(INFO, SCHEDULER, ParallelConfig(), 0, 16, -5)


def test_the_default_on_a_cpu_is_bounded_and_shared_by_the_ranks() -> None:
    assert available_memory_bytes() > 0
    whole = kv_budget_bytes(CPU, INFO, SCHEDULER, ParallelConfig(), 0.9)
    assert 0 < whole <= CPU_MAX_BYTES
    assert kv_budget_bytes(CPU, INFO, SCHEDULER, ParallelConfig(4), 0.9) <= CPU_MAX_BYTES // 4


def test_workspace_grows_with_the_step() -> None:
    wider = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64_000)
    more = step_workspace_bytes(INFO, wider, ParallelConfig(), CPU) - step_workspace_bytes(
        INFO, SCHEDULER, ParallelConfig(), CPU
    )
    assert more > 63_000 * 512 * 2


def test_workspace_holds_what_attention_gathers() -> None:
    def needed(**changes: Any) -> int:
        return step_workspace_bytes(replace(INFO, **changes), SCHEDULER, ParallelConfig(), CPU)

    per_token = 2 * 2 * 64  # keys and values of two heads
    assert needed(max_model_len=100_000) - needed(max_model_len=50_000) == 50_000 * per_token * 2
    longer = needed(max_model_len=100_000, kv_cache_dtype="int8") - needed(
        max_model_len=50_000, kv_cache_dtype="int8"
    )
    assert longer == 50_000 * (per_token * 3 + 2 * 2 * 4)  # as bfloat16 and as integers with a scale
    assert needed(max_model_len=16) == needed(max_model_len=1000), "short contexts are gathered together"


def test_a_gpu_that_packs_weights_has_room_for_a_weight_s_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bfloat16, where there are kernels that want them packed; all else is the same."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**33, 2**34))
    budgets = {}
    for usable, dtype in product((True, False), ("bfloat16", "float16")):
        monkeypatch.setattr(fused, "_usable", lambda device, usable=usable: usable)
        budgets[usable, dtype] = kv_budget_bytes(
            torch.device("cuda:0"), replace(INFO, dtype=dtype), SCHEDULER, ParallelConfig(2), 0.9
        )
    packed = budgets.pop((True, "bfloat16"))
    assert {budget - packed for budget in budgets.values()} == {1024 * 512 * 2}  # gate and up


@pytest.mark.parametrize("num_bytes", [2**60, 2**70])
def test_a_pool_beyond_all_memory_is_refused_with_the_numbers(num_bytes: int) -> None:
    with pytest.raises(ResourceExhaustedError, match=f"KV cache of {num_bytes} bytes") as raised:
        lazy_zeros((4, num_bytes // 8), torch.bfloat16, torch.device("cpu"))
    assert int(raised.value.details["limit"]) > 0


def test_a_pool_takes_memory_only_where_it_is_used() -> None:
    process, size = psutil.Process(), 2**30
    before = process.memory_info().rss
    pool = lazy_zeros((2, size // 4), torch.bfloat16, torch.device("cpu"))
    assert pool.dtype == torch.bfloat16
    assert pool.is_contiguous()
    assert pool.data_ptr() % 64 == 0
    assert not pool[:, :: 2**20].any()
    pool[1, :1000] = 1.0
    assert process.memory_info().rss - before < size // 2
    del pool
    assert process.memory_info().rss - before < 2**26
