"""The blocks in float64, written down once more and as plainly as possible, to judge kernels and reference by."""

from __future__ import annotations

import torch

from fuseline.kernels.types import AttentionSpec, AttentionWeights, MlpWeights, StepMetadata, Weight, float_weight

from .inputs import context_rows

Tensor = torch.Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    y = x @ float_weight(weight).double().T
    return y if bias is None else y + bias.double()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[T, heads, D], pairs (i, i + D / 2)."""
    low, high = x.chunk(2, -1)
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


def new_qkv(
    residual: Tensor,
    delta: Tensor | None,
    weights: AttentionWeights,
    spec: AttentionSpec,
    rotary: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [T, N, D], keys and values [T, K, D] of the step's tokens."""
    hidden = residual.double() if delta is None else residual.double() + delta.double()
    rows = linear(rms_norm(hidden, weights.norm, spec.eps), weights.qkv, weights.qkv_bias)
    heads = rows.view(rows.shape[0], -1, spec.head_dim)
    query, rest = heads[:, : spec.num_heads], heads[:, spec.num_heads :]
    key, value = rest.chunk(2, 1)
    if weights.q_norm is not None and weights.k_norm is not None:
        query, key = rms_norm(query, weights.q_norm, spec.eps), rms_norm(key, weights.k_norm, spec.eps)
    return rotate(query, *rotary), rotate(key, *rotary), value


def attend(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, kv_layer: Tensor, step: StepMetadata
) -> Tensor:
    """[B, N * D] of a decode step over the cache's history and the new keys and values."""
    rows = []
    for row in range(step.num_seqs):
        blocks, offsets = context_rows(step, row, kv_layer.shape[3])
        history = kv_layer[:, blocks[:-1], :, offsets[:-1]].double().transpose(0, 1)  # [2, tokens, K, D]
        keys = torch.cat((history[0], key[row][None])).transpose(0, 1)
        values = torch.cat((history[1], value[row][None])).transpose(0, 1)
        grouped = query[row].view(spec.num_kv_heads, -1, spec.head_dim)
        scores = grouped @ keys.transpose(1, 2) * spec.scale
        rows.append((scores.softmax(-1) @ values).reshape(-1))
    return torch.stack(rows)


def attention_block(
    residual: Tensor,
    delta: Tensor | None,
    weights: AttentionWeights,
    spec: AttentionSpec,
    rotary: tuple[Tensor, Tensor],
    kv_layer: Tensor,
    step: StepMetadata,
) -> tuple[Tensor, Tensor, Tensor]:
    """The block's delta [B, H], and the new tokens' keys and values; changes nothing."""
    query, key, value = new_qkv(residual, delta, weights, spec, rotary)
    attended = attend(query, key, value, spec, kv_layer, step)
    return linear(attended, weights.out, weights.out_bias), key, value


def mlp_block(residual: Tensor, delta: Tensor | None, weights: MlpWeights, eps: float) -> Tensor:
    """The block's delta [B, H]."""
    hidden = residual.double() if delta is None else residual.double() + delta.double()
    gate, up = linear(rms_norm(hidden, weights.norm, eps), weights.gate_up, weights.gate_up_bias).chunk(2, -1)
    return linear(torch.nn.functional.silu(gate) * up, weights.down, weights.down_bias)


def head(residual: Tensor, delta: Tensor | None, norm: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Logits of all rows."""
    hidden = residual.double() if delta is None else residual.double() + delta.double()
    return linear(rms_norm(hidden, norm, eps), weight, None)
