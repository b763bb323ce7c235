"""How many KV blocks fit into a rank's memory."""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path

import torch

from ..kernels import ops
from ..kernels.kv_rows import row_width
from ..kernels.reference.attention_plan import GROUP_TOKENS
from ..runtime.config import ModelInfo, SchedulerConfig
from ..runtime.errors import ResourceExhaustedError
from ..runtime.scheduler import MAX_PROMPT_LOGPROB_TOKENS
from ..runtime.sharding import ParallelConfig, kv_range
from .models.config import DTYPES, KV_DTYPES

# On a CPU the rest of the machine wants memory too, and nobody expects a default to take gigabytes.
CPU_FRACTION_OF_FREE = 1 / 8
CPU_MAX_BYTES = 2 * 2**30
_WORKSPACE_SLACK = 1.25


def kv_block_bytes(info: ModelInfo, parallel: ParallelConfig, rank: int, block_size: int) -> int:
    """Bytes of one KV block on a rank: keys and values of its layers and heads."""
    held = kv_range(info.shape, parallel, rank)
    dtype = KV_DTYPES[info.kv_dtype]
    row_bytes = row_width(info.shape.head_dim, dtype) * dtype.itemsize
    return held.num_layers * 2 * held.num_heads * block_size * row_bytes


def max_kv_blocks(
    info: ModelInfo, scheduler: SchedulerConfig, parallel: ParallelConfig, rank: int, block_size: int, budget: int
) -> int:
    """Blocks that fit into ``budget`` bytes, but no more than all running sequences can ever fill at once.

    Raises:
        ResourceExhaustedError: not even one sequence of ``max_model_len`` fits; says what it needs and what there is.
    """
    block_bytes = kv_block_bytes(info, parallel, rank, block_size)
    blocks_per_seq = -(-info.max_model_len // block_size)
    num_blocks = min(budget // block_bytes, blocks_per_seq * scheduler.max_num_seqs)
    if num_blocks < blocks_per_seq:
        raise ResourceExhaustedError(
            f"the KV cache of one sequence of max_model_len={info.max_model_len} tokens needs"
            f" {blocks_per_seq * block_bytes} bytes on rank {rank}, and there are {max(budget, 0)};"
            " lower max_model_len or give the cache more memory",
            field="max_model_len",
            value=info.max_model_len,
            needed_bytes=blocks_per_seq * block_bytes,
            limit=max(budget, 0),
        )
    return num_blocks


def kv_budget_bytes(
    device: torch.device,
    info: ModelInfo,
    scheduler: SchedulerConfig,
    parallel: ParallelConfig,
    memory_fraction: float,
) -> int:
    """Bytes that a rank's KV cache may take when nobody said how many; asked for after the weights are loaded.

    On a GPU: what ``memory_fraction`` of its memory leaves beside what is in use and a step's work space. On a CPU:
    an eighth of the memory that is free, at most 2 GiB, shared by the group's ranks.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(total * memory_fraction) - (total - free) - step_workspace_bytes(info, scheduler, parallel, device)
    return int(min(available_memory_bytes() * CPU_FRACTION_OF_FREE, CPU_MAX_BYTES)) // parallel.world_size


def step_workspace_bytes(
    info: ModelInfo, scheduler: SchedulerConfig, parallel: ParallelConfig, device: torch.device
) -> int:
    """An upper estimate of a GPU step's temporaries: activations of one layer, logits as computed and in float32,
    what sampler and attention need beside them, the KV that attention gathers, and a packed weight's rows."""
    shape, tp = info.shape, parallel.tensor_parallel_size
    itemsize = DTYPES[info.dtype].itemsize
    qkv = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim // tp
    per_token = (6 * shape.hidden_size + 3 * qkv + 4 * shape.intermediate_size // tp) * itemsize
    per_token += 2 * shape.hidden_size * 4  # the residual stream is float32
    num_logits = scheduler.max_num_seqs + min(scheduler.max_num_batched_tokens, MAX_PROMPT_LOGPROB_TOKENS)
    logits = num_logits * shape.vocab_size * (itemsize + 4)
    activations = int((scheduler.max_num_batched_tokens * per_token + logits) * _WORKSPACE_SLACK)
    unpacked = _unpacked_bytes(info, tp) if ops.packs_weights(DTYPES[info.dtype], device) else 0
    return activations + _gather_bytes(info, tp) + unpacked + 256 * 2**20


def _gather_bytes(info: ModelInfo, tp: int) -> int:
    """Of the longest context, or of a group of shorter ones: rows as they are cached, if in int8, and as floats."""
    shape, kv_dtype = info.shape, KV_DTYPES[info.kv_dtype]
    row_bytes = shape.head_dim * DTYPES[info.dtype].itemsize
    if kv_dtype == torch.int8:
        row_bytes += row_width(shape.head_dim, kv_dtype)
    return max(info.max_model_len, GROUP_TOKENS) * 2 * -(-shape.num_kv_heads // tp) * row_bytes


def _unpacked_bytes(info: ModelInfo, tp: int) -> int:
    """Of the largest weight, which the GPU's blocks have in an order of their own, and torch needs in rows."""
    shape = info.shape
    rows = max(
        (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim, 2 * shape.intermediate_size, shape.vocab_size
    )
    return -(-rows // tp) * shape.hidden_size * 2


def available_memory_bytes() -> int:
    """Memory that can be had without swapping: the machine's, or the cgroup's when that is less."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, max(0, int(text) - int(used.read_text())))
    return available


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros. On a CPU they take memory only page by page as they are touched: a KV pool is rarely full.

    Raises:
        ResourceExhaustedError: not even the addresses can be had.
    """
    if device.type != "cpu" or math.prod(shape) == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    try:
        pages = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        available = available_memory_bytes()
        raise ResourceExhaustedError(
            f"a KV cache of {num_bytes} bytes cannot be made: {error}; {available} bytes are available",
            value=num_bytes,
            limit=available,
        ) from error
    return torch.frombuffer(pages, dtype=dtype).view(shape)
