"""How a step's attention is laid out for plain torch: lists of rows to gather, made once and used by every layer.

Decodes are grouped by context length, at most a factor of two apart, so that each group is one gather and one call of
SDPA. A prefill chunk is gathered for itself. Layers with different sliding windows look at different parts of the
context, so there is one layout per window.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from ..kv_rows import row_head_dim, row_width
from ..types import StepMetadata

Tensor = torch.Tensor
Int64Array = NDArray[np.int64]

# Bounds the memory of one gather: tokens of context, padding included, that a decode group holds at most. A single
# sequence may exceed it.
GROUP_TOKENS = 16384


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """Sizes of one layer of the cache, [2, num_blocks, num_kv_heads, block_size, row_width]; see ``kv_rows``."""

    num_blocks: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, kv_layer: Tensor) -> KvGeometry:
        """Read them off one layer's tensor."""
        _, num_blocks, num_kv_heads, block_size, _ = kv_layer.shape
        return cls(num_blocks, num_kv_heads, block_size, row_head_dim(kv_layer), kv_layer.dtype)

    @property
    def row_width(self) -> int:
        """Elements of a row."""
        return row_width(self.head_dim, self.dtype)


@dataclass(frozen=True, eq=False, slots=True)
class DecodeGroup:
    """Decodes that are computed together, n of them, each padded to the same number of gathered tokens s.

    Attributes:
        tokens: int64[n], their rows in the step; a group of all of the step's rows has them in order.
        pages: int64[2 * n * K * s / block_size], rows of the layer seen as [2 * num_blocks * K,
            block_size * row_width].
        low, high: the part of the s gathered tokens that any query may see; for sequences of equal length, as for a
            single one, all of that part.
        padding: int64[...], rows of the gathered [2 * n * K * s, D] inside that part that a query may not see.
        mask: [n, 1, 1, high - low], 0 where the query may look and -inf elsewhere; None when it may everywhere.
    """

    tokens: Tensor
    num_seqs: int
    num_gathered: int
    pages: Tensor
    low: int
    high: int
    padding: Tensor
    mask: Tensor | None


@dataclass(frozen=True, eq=False, slots=True)
class PrefillChunk:
    """Tokens ``[token_start, token_end)`` of the step, the last ones of a context of ``context_len``.

    ``pages`` gathers the context from position ``first`` on, which is a multiple of the block size.
    """

    token_start: int
    token_end: int
    context_len: int
    first: int
    pages: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class AttentionWork:
    """The gathers of a step for layers of one sliding window."""

    groups: tuple[DecodeGroup, ...]
    chunks: tuple[PrefillChunk, ...]


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """What every attention layer of a step shares; laid out when first asked for, since fused blocks need none of it.

    Attributes:
        windows: the sliding windows that occur among the layers.
        dtype: of the queries.
    """

    step: StepMetadata
    geometry: KvGeometry
    windows: frozenset[int | None]
    dtype: torch.dtype

    @cached_property
    def store_rows(self) -> Tensor:
        """int64[T * K], rows of a layer's keys seen as [num_blocks * K * block_size, row_width]."""
        return _store_rows(self.step.slot_mapping, self.geometry)

    @cached_property
    def work(self) -> dict[int | None, AttentionWork]:
        """The gathers, by sliding window."""
        return {window: _plan_window(self.step, self.geometry, window, self.dtype) for window in self.windows}

    @cached_property
    def workspace(self) -> Tensor:
        """[n, block_size * D], where every gather goes: fresh memory for each would cost more than the copy."""
        gathers = [part.pages for each in self.work.values() for part in each.groups]
        gathers += [part.pages for each in self.work.values() for part in each.chunks]
        largest = max(pages.shape[0] for pages in gathers)
        shape = (largest, self.geometry.block_size * self.geometry.head_dim)
        return torch.empty(shape, dtype=self.dtype, device=self.step.slot_mapping.device)


def plan_attention(
    step: StepMetadata, geometry: KvGeometry, windows: Iterable[int | None], dtype: torch.dtype
) -> AttentionPlan:
    """See ``ops.plan_attention``."""
    return AttentionPlan(step, geometry, frozenset(windows), dtype)


def _store_rows(slots: Tensor, geometry: KvGeometry) -> Tensor:
    size, heads = geometry.block_size, geometry.num_kv_heads
    blocks = torch.div(slots, size, rounding_mode="floor")
    first_head = blocks * ((heads - 1) * size) + slots
    return (first_head[:, None] + torch.arange(0, heads * size, size, device=slots.device)).view(-1)


@dataclass(frozen=True, eq=False, slots=True)
class _Extents:
    """What of its context each sequence of a step looks at; int64[B] each.

    Attributes:
        starts: its first token in the step.
        seen_from: the first position that its first query sees.
        first_blocks, num_blocks: the columns of its block table from there to the end of its context.
    """

    starts: Int64Array
    query_lens: Int64Array
    context_lens: Int64Array
    seen_from: Int64Array
    first_blocks: Int64Array
    num_blocks: Int64Array

    @classmethod
    def of(cls, step: StepMetadata, block_size: int, window: int | None) -> _Extents:
        starts = step.query_start_host.astype(np.int64)
        context_lens = step.context_lens_host.astype(np.int64)
        query_lens = np.diff(starts)
        seen_from = np.zeros_like(context_lens)
        if window is not None:
            np.maximum(context_lens - query_lens - window + 1, 0, out=seen_from)
        first_blocks = seen_from // block_size
        num_blocks = -(-context_lens // block_size) - first_blocks
        return cls(starts[:-1], query_lens, context_lens, seen_from, first_blocks, num_blocks)


def _plan_window(step: StepMetadata, geometry: KvGeometry, window: int | None, dtype: torch.dtype) -> AttentionWork:
    extents = _Extents.of(step, geometry.block_size, window)
    decodes = np.flatnonzero(extents.query_lens == 1)
    groups = _group_by_length(decodes, extents.num_blocks, geometry.block_size)
    return AttentionWork(
        tuple(_plan_group(step, geometry, extents, rows, dtype) for rows in groups),
        tuple(_plan_chunk(step, geometry, extents, int(row)) for row in np.flatnonzero(extents.query_lens > 1)),
    )


def _plan_chunk(step: StepMetadata, geometry: KvGeometry, extents: _Extents, row: int) -> PrefillChunk:
    start, column = int(extents.starts[row]), int(extents.first_blocks[row])
    blocks = step.block_tables[row : row + 1, column : column + int(extents.num_blocks[row])]
    return PrefillChunk(
        token_start=start,
        token_end=start + int(extents.query_lens[row]),
        context_len=int(extents.context_lens[row]),
        first=column * geometry.block_size,
        pages=_pages(blocks.long(), geometry),
    )


def _group_by_length(decodes: Int64Array, num_blocks: Int64Array, block_size: int) -> Iterator[Int64Array]:
    """Cut the decodes into groups whose block counts are within a factor of two, or all small."""
    if not decodes.size:
        return
    buckets = np.ceil(np.log2(np.maximum(num_blocks[decodes], 8)))
    if buckets.min() == buckets.max():
        by_length = [decodes]
    else:
        by_length = [decodes[buckets == bucket] for bucket in np.unique(buckets)]
    for members in by_length:
        size = max(1, GROUP_TOKENS // int(num_blocks[members].max() * block_size))
        for start in range(0, members.size, size):
            yield members[start : start + size]


def _plan_group(
    step: StepMetadata, geometry: KvGeometry, extents: _Extents, rows: Int64Array, dtype: torch.dtype
) -> DecodeGroup:
    device = step.block_tables.device
    first, count = extents.first_blocks[rows], extents.num_blocks[rows]
    width = int(count.max())
    # Past its last block a sequence repeats that block: the ids behind it in the table may be anything.
    columns = first[:, None] + np.minimum(np.arange(width), count[:, None] - 1)
    tables = step.block_tables.index_select(0, torch.from_numpy(rows).to(device))
    blocks = tables.long().gather(1, torch.from_numpy(columns).to(device))
    gathered = width * geometry.block_size
    positions = first[:, None] * geometry.block_size + np.arange(gathered)
    hidden = (positions < extents.seen_from[rows, None]) | (positions >= extents.context_lens[rows, None])
    seen_by_any = np.flatnonzero(~hidden.all(0))
    low, high = int(seen_by_any[0]), int(seen_by_any[-1]) + 1
    hidden[:, :low] = hidden[:, high:] = False
    mask = None
    if hidden.any():
        mask = torch.zeros(rows.size, 1, 1, high - low, dtype=dtype)
        mask.masked_fill_(torch.from_numpy(hidden[:, low:high])[:, None, None], float("-inf"))
        mask = mask.to(device)
    return DecodeGroup(
        tokens=torch.from_numpy(extents.starts[rows]).to(device),
        num_seqs=rows.size,
        num_gathered=gathered,
        pages=_pages(blocks, geometry),
        low=low,
        high=high,
        padding=torch.from_numpy(_rows_of(hidden, geometry.num_kv_heads)).to(device),
        mask=mask,
    )


def _rows_of(hidden: NDArray[np.bool_], num_kv_heads: int) -> Int64Array:
    """Where ``hidden`` [n, s] is set, as rows of [2 * n * K * s, D]."""
    num_seqs, gathered = hidden.shape
    seq, token = np.nonzero(hidden)
    head_rows = (seq * num_kv_heads * gathered + token) + np.arange(num_kv_heads)[:, None] * gathered
    half = num_seqs * num_kv_heads * gathered
    return np.concatenate((head_rows.ravel(), head_rows.ravel() + half))


def _pages(blocks: Tensor, geometry: KvGeometry) -> Tensor:
    """Rows that gather blocks [n, w] of a layer as [2, n, K, w], each row one block of one head."""
    heads = torch.arange(geometry.num_kv_heads, device=blocks.device)
    keys = (blocks * geometry.num_kv_heads)[:, None, :] + heads[:, None]
    return torch.cat((keys.reshape(-1), keys.reshape(-1) + geometry.num_blocks * geometry.num_kv_heads))
