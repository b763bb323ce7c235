"""Paged attention in plain torch.

Once per step, ``plan_attention`` turns the metadata into lists of rows to gather, per sliding window; every layer
with that window then uses them. Decodes are grouped by context length, at most a factor of two apart, and each group
is one gather and one call of SDPA. A prefill chunk is gathered for itself and cut into pieces of ``QUERY_PIECE``
queries, so that a mask never outgrows that many rows. What a gather brings in beyond a context is overwritten with
zeros before it is used: masking its score alone would not do, since zero times a stale NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ..types import StepMetadata

Tensor = torch.Tensor
Int64Array = NDArray[np.int64]

# Bounds the memory of one gather: tokens of context, padding included, that a decode group holds at most. A single
# sequence may exceed it.
GROUP_TOKENS = 16384
QUERY_PIECE = 256


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """Sizes of one layer of the cache, [2, num_blocks, num_kv_heads, block_size, head_dim]."""

    num_blocks: int
    num_kv_heads: int
    block_size: int
    head_dim: int

    @classmethod
    def of(cls, kv_layer: Tensor) -> KvGeometry:
        """Read them off one layer's tensor."""
        _, num_blocks, num_kv_heads, block_size, head_dim = kv_layer.shape
        return cls(num_blocks, num_kv_heads, block_size, head_dim)


@dataclass(frozen=True, eq=False, slots=True)
class DecodeGroup:
    """Decodes that are computed together, n of them, each padded to the same number of gathered tokens s.

    Attributes:
        tokens: int64[n], their rows in the step; a group of all of the step's rows has them in order.
        pages: int64[2 * n * K * s / block_size], rows of the layer seen as [2 * num_blocks * K, block_size * D].
        padding: int64[...], rows of the gathered [2 * n * K * s, D] that hold nothing the query may see.
        mask: [n, 1, 1, s], 0 where the query may look and -inf elsewhere; None when nothing is padded.
    """

    tokens: Tensor
    num_seqs: int
    num_gathered: int
    pages: Tensor
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


@dataclass(frozen=True, eq=False, slots=True)
class AttentionPlan:
    """What every attention layer of a step shares.

    Attributes:
        store_rows: int64[T * K], rows of a layer's keys seen as [num_blocks * K * block_size, D].
        work: by sliding window.
        workspace: [n, block_size * D], where every gather goes: fresh memory for each would cost more than the copy.
    """

    step: StepMetadata
    geometry: KvGeometry
    store_rows: Tensor
    work: dict[int | None, AttentionWork]
    workspace: Tensor


def plan_attention(
    step: StepMetadata, geometry: KvGeometry, windows: Iterable[int | None], dtype: torch.dtype
) -> AttentionPlan:
    """See ``ops.plan_attention``."""
    work = {window: _plan_window(step, geometry, window, dtype) for window in set(windows)}
    gathers = [part.pages for each in work.values() for part in each.groups]
    gathers += [part.pages for each in work.values() for part in each.chunks]
    largest = max(pages.shape[0] for pages in gathers)
    workspace = torch.empty(
        (largest, geometry.block_size * geometry.head_dim), dtype=dtype, device=step.slot_mapping.device
    )
    return AttentionPlan(step, geometry, _store_rows(step.slot_mapping, geometry), work, workspace)


def kv_store(key: Tensor, value: Tensor, kv_layer: Tensor, plan: AttentionPlan) -> None:
    """See ``ops.kv_store``."""
    head_dim = plan.geometry.head_dim
    kv_layer[0].view(-1, head_dim).index_copy_(0, plan.store_rows, key.reshape(-1, head_dim))
    kv_layer[1].view(-1, head_dim).index_copy_(0, plan.store_rows, value.reshape(-1, head_dim))


def paged_attention(
    query: Tensor, kv_layer: Tensor, plan: AttentionPlan, scale: float, sliding_window: int | None
) -> Tensor:
    """See ``ops.paged_attention``."""
    work = plan.work[sliding_window]
    if len(work.groups) == 1 and work.groups[0].num_seqs == query.shape[0]:
        return _decode(query, kv_layer, work.groups[0], plan, scale)
    out = torch.empty_like(query)
    for group in work.groups:
        rows = query.index_select(0, group.tokens)
        out.index_copy_(0, group.tokens, _decode(rows, kv_layer, group, plan, scale))
    for chunk in work.chunks:
        _prefill(query, out, kv_layer, chunk, plan, scale, sliding_window)
    return out


def _store_rows(slots: Tensor, geometry: KvGeometry) -> Tensor:
    size, heads = geometry.block_size, geometry.num_kv_heads
    blocks = torch.div(slots, size, rounding_mode="floor")
    first_head = blocks * ((heads - 1) * size) + slots
    return (first_head[:, None] + torch.arange(0, heads * size, size, device=slots.device)).view(-1)


def _plan_window(step: StepMetadata, geometry: KvGeometry, window: int | None, dtype: torch.dtype) -> AttentionWork:
    starts = step.query_start_host.astype(np.int64)
    context_lens = step.context_lens_host.astype(np.int64)
    query_lens = np.diff(starts)
    # The first position that the first of a sequence's queries sees, and the block that holds it.
    seen_from = np.zeros_like(context_lens)
    if window is not None:
        np.maximum(context_lens - query_lens - window + 1, 0, out=seen_from)
    first_blocks = seen_from // geometry.block_size
    num_blocks = -(-context_lens // geometry.block_size) - first_blocks
    decodes = np.flatnonzero(query_lens == 1)
    groups = tuple(
        _plan_group(step, geometry, rows, starts, seen_from, first_blocks, num_blocks, dtype)
        for rows in _group_by_length(decodes, num_blocks, geometry.block_size)
    )
    chunks = tuple(
        PrefillChunk(
            int(starts[i]),
            int(starts[i + 1]),
            int(context_lens[i]),
            int(first_blocks[i]) * geometry.block_size,
            _pages(
                step.block_tables[i : i + 1, int(first_blocks[i]) : int(first_blocks[i] + num_blocks[i])].long(),
                geometry,
            ),
        )
        for i in np.flatnonzero(query_lens > 1)
    )
    return AttentionWork(groups, chunks)


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
    step: StepMetadata,
    geometry: KvGeometry,
    rows: Int64Array,
    starts: Int64Array,
    seen_from: Int64Array,
    first_blocks: Int64Array,
    num_blocks: Int64Array,
    dtype: torch.dtype,
) -> DecodeGroup:
    device = step.block_tables.device
    wanted, first, count = seen_from[rows], first_blocks[rows], num_blocks[rows]
    width = int(count.max())
    # Past its last block a sequence repeats that block: the ids behind it in the table may be anything.
    columns = first[:, None] + np.minimum(np.arange(width), count[:, None] - 1)
    tables = step.block_tables.index_select(0, torch.from_numpy(rows).to(device))
    blocks = tables.long().gather(1, torch.from_numpy(columns).to(device))
    gathered = width * geometry.block_size
    positions = first[:, None] * geometry.block_size + np.arange(gathered)
    hidden = (positions < wanted[:, None]) | (positions >= step.context_lens_host[rows][:, None])
    mask = None
    if hidden.any():
        mask = torch.zeros(rows.size, 1, 1, gathered, dtype=dtype)
        mask.masked_fill_(torch.from_numpy(hidden)[:, None, None], float("-inf"))
        mask = mask.to(device)
    return DecodeGroup(
        tokens=torch.from_numpy(starts[rows]).to(device),
        num_seqs=rows.size,
        num_gathered=gathered,
        pages=_pages(blocks, geometry),
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


def _gather(kv_layer: Tensor, pages: Tensor, plan: AttentionPlan) -> Tensor:
    out = plan.workspace[: pages.shape[0]]
    return torch.index_select(kv_layer.view(-1, out.shape[1]), 0, pages, out=out)


def _decode(query: Tensor, kv_layer: Tensor, group: DecodeGroup, plan: AttentionPlan, scale: float) -> Tensor:
    geometry = plan.geometry
    kv = _gather(kv_layer, group.pages, plan)
    if group.mask is not None:
        kv.view(-1, geometry.head_dim).index_fill_(0, group.padding, 0)
    kv = kv.view(2, group.num_seqs, geometry.num_kv_heads, group.num_gathered, geometry.head_dim)
    # The query heads that share a KV head stand in for queries: with one token each they share the mask too.
    grouped = query.reshape(group.num_seqs, geometry.num_kv_heads, -1, geometry.head_dim)
    attended = F.scaled_dot_product_attention(grouped, kv[0], kv[1], attn_mask=group.mask, scale=scale)
    return attended.reshape(query.shape)


def _prefill(
    query: Tensor,
    out: Tensor,
    kv_layer: Tensor,
    chunk: PrefillChunk,
    plan: AttentionPlan,
    scale: float,
    window: int | None,
) -> None:
    num_kv_heads, head_dim = plan.geometry.num_kv_heads, plan.geometry.head_dim
    num_queries = chunk.token_end - chunk.token_start
    num_heads = query.shape[1]
    group = num_heads // num_kv_heads
    kv = _gather(kv_layer, chunk.pages, plan).view(2, num_kv_heads, 1, -1, head_dim)
    # [K, N / K, queries, D] against keys expanded over the N / K query heads that share them, without a copy.
    queries = query[chunk.token_start : chunk.token_end].view(num_queries, num_kv_heads, group, head_dim)
    queries = queries.permute(1, 2, 0, 3)
    results = out[chunk.token_start : chunk.token_end].view(num_queries, num_kv_heads, group, head_dim)
    history = chunk.context_len - num_queries
    whole = history == 0 and (window is None or window >= num_queries)
    piece = num_queries if whole else QUERY_PIECE
    for start in range(0, num_queries, piece):
        end = min(start + piece, num_queries)
        low = 0 if window is None else max(0, history + start - window + 1)
        high = history + end
        keys, values = kv[:, :, :, low - chunk.first : high - chunk.first].expand(-1, -1, group, -1, -1)
        mask = None if whole else _causal_mask(history + start, history + end, low, high, window, query)
        attended = F.scaled_dot_product_attention(
            queries[:, :, start:end], keys, values, attn_mask=mask, is_causal=whole, scale=scale
        )
        results[start:end] = attended.permute(2, 0, 1, 3)


def _causal_mask(start: int, end: int, low: int, high: int, window: int | None, like: Tensor) -> Tensor:
    """0 or -inf for queries ``[start, end)`` by keys ``[low, high)``."""
    queries = torch.arange(start, end, device=like.device)[:, None]
    keys = torch.arange(low, high, device=like.device)
    hidden = keys > queries
    if window is not None:
        hidden |= keys <= queries - window
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, float("-inf"))
