"""Paged attention in plain torch, as ``attention_plan`` lays it out.

A prefill chunk is cut into pieces of ``QUERY_PIECE`` queries, so that a mask never outgrows that many rows. What a
gather brings in beyond a context is overwritten with zeros before it is used: masking its score alone would not do,
since zero times a stale NaN is NaN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..kv_rows import dequantize_rows, quantize_rows
from .attention_plan import AttentionPlan, DecodeGroup, PrefillChunk

Tensor = torch.Tensor
QUERY_PIECE = 256


def kv_store(key: Tensor, value: Tensor, kv_layer: Tensor, plan: AttentionPlan) -> None:
    """See ``ops.kv_store``."""
    for kind, given in enumerate((key, value)):
        rows = given.reshape(-1, plan.geometry.head_dim)
        if kv_layer.dtype == torch.int8:
            rows = quantize_rows(rows)
        kv_layer[kind].view(-1, plan.geometry.row_width).index_copy_(0, plan.store_rows, rows)


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


def _gather(kv_layer: Tensor, pages: Tensor, plan: AttentionPlan) -> Tensor:
    geometry = plan.geometry
    out = plan.workspace[: pages.shape[0]]
    blocks = kv_layer.view(-1, geometry.block_size * geometry.row_width)
    if kv_layer.dtype != torch.int8:
        return torch.index_select(blocks, 0, pages, out=out)
    rows = blocks.index_select(0, pages).view(-1, geometry.row_width)
    dequantize_rows(rows, out.view(-1, geometry.head_dim))
    return out


def _decode(query: Tensor, kv_layer: Tensor, group: DecodeGroup, plan: AttentionPlan, scale: float) -> Tensor:
    geometry = plan.geometry
    kv = _gather(kv_layer, group.pages, plan)
    if group.mask is not None:
        kv.view(-1, geometry.head_dim).index_fill_(0, group.padding, 0)
    kv = kv.view(2, group.num_seqs, geometry.num_kv_heads, group.num_gathered, geometry.head_dim)
    kv = kv[:, :, :, group.low : group.high]
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
