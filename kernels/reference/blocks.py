"""The three composite ops of a decoder, put together from the single ones."""

from __future__ import annotations

import torch

from ..types import AttentionSpec, AttentionWeights, MlpWeights, Weight
from .attention import kv_store, paged_attention
from .attention_plan import AttentionPlan
from .dense import add_rms_norm, linear, rms_norm, rotary_embedding, silu_and_mul

Tensor = torch.Tensor


def attention_block(
    residual: Tensor,
    delta: Tensor | None,
    weights: AttentionWeights,
    spec: AttentionSpec,
    rotary: tuple[Tensor, Tensor],
    kv_layer: Tensor,
    plan: AttentionPlan,
) -> tuple[Tensor, Tensor]:
    """See ``ops.attention_block``."""
    residual, normed = add_rms_norm(residual, delta, weights.norm, spec.eps)
    heads = linear(normed, weights.qkv, weights.qkv_bias).view(residual.shape[0], -1, spec.head_dim)
    num_rotated = spec.num_heads + spec.num_kv_heads
    rotated = heads[:, :num_rotated]
    if weights.q_norm is not None and weights.k_norm is not None:
        query, key = rotated[:, : spec.num_heads], rotated[:, spec.num_heads :]
        rotated = torch.cat(
            (rms_norm(query, weights.q_norm, spec.eps), rms_norm(key, weights.k_norm, spec.eps)), dim=1
        )
    rotated = rotary_embedding(rotated, *rotary)
    kv_store(rotated[:, spec.num_heads :], heads[:, num_rotated:], kv_layer, plan)
    query = rotated[:, : spec.num_heads]
    attended = paged_attention(query, kv_layer, plan, spec.scale, spec.sliding_window)
    return residual, linear(attended.reshape(residual.shape[0], -1), weights.out, weights.out_bias)


def mlp_block(residual: Tensor, delta: Tensor | None, weights: MlpWeights, eps: float) -> tuple[Tensor, Tensor]:
    """See ``ops.mlp_block``."""
    residual, normed = add_rms_norm(residual, delta, weights.norm, eps)
    inner = silu_and_mul(linear(normed, weights.gate_up, weights.gate_up_bias))
    return residual, linear(inner, weights.down, weights.down_bias)


def head(
    residual: Tensor, delta: Tensor | None, norm: Tensor, weight: Weight, logits_indices: Tensor, eps: float
) -> Tensor:
    """See ``ops.head``."""
    rows = residual.index_select(0, logits_indices)
    rows_delta = None if delta is None else delta.index_select(0, logits_indices)
    _, normed = add_rms_norm(rows, rows_delta, norm, eps)
    return linear(normed, weight, None).float()


def head_candidates(
    residual: Tensor,
    delta: Tensor | None,
    norm: Tensor,
    weight: Weight,
    logits_indices: Tensor,
    num_candidates: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See ``ops.head_candidates``."""
    logits = head(residual, delta, norm, weight, logits_indices, eps)
    best, rows = logits.sort(dim=1, descending=True, stable=True)  # topk takes equal ones in any order
    return best[:, :num_candidates].contiguous(), rows[:, :num_candidates].int()
