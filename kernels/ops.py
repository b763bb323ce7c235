"""The ops: one signature each, checked here, computed by an implementation behind it.

A model calls ``plan_attention`` and ``rotary_cos_sin`` once per step, ``embedding``, then per layer
``attention_block`` and ``mlp_block``, then ``head``. The block ops keep the residual stream apart from the last
block's output: each takes ``(residual, delta)``, works on ``residual + delta``, and returns that sum and its own
``delta``. With tensor parallelism ``delta`` is a partial sum, and the caller all-reduces it between the blocks; so an
implementation may fuse a whole block, from the addition to the output projection, into one kernel. The residual is
float32 whatever the weights' dtype; a delta is float32 or of the weights' dtype, as the implementation makes it.

The single ops are the pieces of those blocks. Every op checks shapes, dtypes and devices before it computes anything
and raises KernelArgumentError; what only the values can tell (a block id out of range) is the caller's promise.
Unless stated otherwise an op changes none of its arguments. Letters in shapes are those of ``kernels.types``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .checks import (
    check_dims,
    check_index,
    check_layer,
    check_linear,
    check_rows,
    check_step,
    check_stream,
    check_width,
    check_window,
    describe,
)
from .cuda import fused
from .errors import KernelArgumentError
from .reference import attention, attention_plan, blocks, dense
from .reference.attention_plan import AttentionPlan, KvGeometry
from .types import AttentionSpec, AttentionWeights, MlpWeights, StepMetadata, Weight

Tensor = torch.Tensor

__all__ = [
    "AttentionPlan",
    "AttentionSpec",
    "AttentionWeights",
    "KernelArgumentError",
    "MlpWeights",
    "StepMetadata",
    "add_rms_norm",
    "attention_block",
    "embedding",
    "gather_rows",
    "head",
    "head_candidates",
    "kv_store",
    "linear",
    "mlp_block",
    "packs_weights",
    "paged_attention",
    "plan_attention",
    "prepare_attention",
    "prepare_head",
    "prepare_mlp",
    "rms_norm",
    "rotary_cos_sin",
    "rotary_embedding",
    "silu_and_mul",
]


def embedding(token_ids: Tensor, weight: Tensor, vocab_start: int, vocab_size: int) -> Tensor:
    """Rows of a vocabulary shard; zeros for tokens that live on other shards, so that the shards' results add up.

    Args:
        token_ids: int64[T], each in ``[0, vocab_size)``.
        weight: [V, H], rows ``[vocab_start, vocab_start + V)`` of the table.

    Returns:
        float32[T, H].
    """
    check_index("token_ids", token_ids, weight)
    check_dims("weight", weight, 2)
    if not 0 <= vocab_start <= vocab_start + weight.shape[0] <= vocab_size:
        raise KernelArgumentError(f"rows {vocab_start}+{weight.shape[0]} are outside a vocabulary of {vocab_size}")
    return dense.embedding(token_ids, weight, vocab_start, vocab_size)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x**2) + eps) * weight`` over the last dimension.

    Args:
        x: [..., n], float32 or of the dtype of ``weight``.
        weight: [n].

    Returns:
        [..., n], of the dtype of ``weight``.
    """
    check_width("x", x, weight)
    return dense.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x + delta`` (``x`` itself when there is no delta) in float32, and its RMSNorm.

    Args:
        x: float32[..., n].
        delta: of the same shape, float32 or of the dtype of ``weight``.
        weight: [n].

    Returns:
        float32[..., n], and [..., n] of the dtype of ``weight``.
    """
    check_stream(x, delta, weight)
    return dense.add_rms_norm(x, delta, weight, eps)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, of the dtype of ``x``.

    Args:
        x: [..., in].
        weight: [out, in]; a quantised one rounds ``x`` too, see ``kernels.quantized``.
        bias: [out].
    """
    check_linear("x", x, weight)
    if bias is not None and (tuple(bias.shape) != tuple(weight.shape[:1]) or bias.dtype != x.dtype):
        raise KernelArgumentError(f"bias {tuple(bias.shape)} {bias.dtype} does not fit weight {tuple(weight.shape)}")
    return dense.linear(x, weight, bias)


def rotary_cos_sin(positions: Tensor, inv_freq: Tensor, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of ``positions * inv_freq``, times ``scaling``.

    Args:
        positions: int64[T].
        inv_freq: float32[D / 2], or [T, D / 2] when frequencies differ by token.

    Returns:
        Two of float32[T, D / 2].
    """
    check_index("positions", positions, inv_freq)
    if inv_freq.dtype != torch.float32 or inv_freq.dim() not in (1, 2):
        raise KernelArgumentError(f"inv_freq must be float32 [D/2] or [T, D/2], got {describe(inv_freq)}")
    if inv_freq.dim() == 2 and inv_freq.shape[0] != positions.shape[0]:
        raise KernelArgumentError(f"inv_freq has {inv_freq.shape[0]} rows for {positions.shape[0]} positions")
    return dense.rotary_cos_sin(positions, inv_freq, scaling)


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs ``(i, i + D/2)`` of every head (the NeoX, or half-split, layout).

    Args:
        x: [T, heads, D].
        cos, sin: float32[T, D / 2].
    """
    check_dims("x", x, 3)
    expected = (x.shape[0], x.shape[2] // 2)
    if x.shape[2] % 2 or tuple(cos.shape) != expected or tuple(sin.shape) != expected:
        raise KernelArgumentError(f"x {tuple(x.shape)} needs cos and sin {expected}, got {tuple(cos.shape)}")
    return dense.rotary_embedding(x, cos, sin)


def silu_and_mul(x: Tensor) -> Tensor:
    """``silu(gate) * up`` where ``x`` [..., 2 * n] holds gate, then up."""
    if x.shape[-1] % 2:
        raise KernelArgumentError(f"the last dimension must be even, got {x.shape[-1]}")
    return dense.silu_and_mul(x)


def gather_rows(x: Tensor, indices: Tensor) -> Tensor:
    """Rows ``indices`` int64[S] of ``x`` [T, ...]: the positions whose logits are wanted."""
    check_index("indices", indices, x)
    return x.index_select(0, indices)


def plan_attention(
    step: StepMetadata, kv_cache: Tensor, windows: Iterable[int | None], dtype: torch.dtype
) -> AttentionPlan:
    """Prepare a step's metadata for the attention of all layers. Call once per step.

    Args:
        kv_cache: [layers, 2, num_blocks, K, block_size, row_width], see ``kv_rows``; only its form is used.
        windows: the sliding windows that occur among the layers.
        dtype: of the queries.

    Returns:
        Valid for this step and caches of this shape only; holds on to the step's tensors.
    """
    check_step(step, kv_cache)
    return attention_plan.plan_attention(step, KvGeometry.of(kv_cache[0]), windows, dtype)


def kv_store(key: Tensor, value: Tensor, kv_layer: Tensor, plan: AttentionPlan) -> None:
    """Write the step's keys and values into their slots. Changes ``kv_layer``.

    Args:
        key, value: [T, K, D], of the plan's dtype.
        kv_layer: [2, num_blocks, K, block_size, row_width], contiguous; keys, then values. Of int8, or as they are.
    """
    check_layer(kv_layer, plan)
    expected = (plan.step.num_tokens, plan.geometry.num_kv_heads, plan.geometry.head_dim)
    for name, tensor in (("key", key), ("value", value)):
        if tuple(tensor.shape) != expected or tensor.dtype != plan.dtype or tensor.device != kv_layer.device:
            raise KernelArgumentError(f"{name} must be {expected} {plan.dtype}, got {describe(tensor)}")
    attention.kv_store(key, value, kv_layer, plan)


def paged_attention(
    query: Tensor, kv_layer: Tensor, plan: AttentionPlan, scale: float, sliding_window: int | None = None
) -> Tensor:
    """Causal attention of the step's queries over their sequences' KV, the step's own tokens included.

    Query head ``h`` uses KV head ``h // (N / K)``. Nothing outside a context is read into the result, NaN included.

    Args:
        query: [T, N, D].
        kv_layer: as for ``kv_store``, the step's KV already stored.
        sliding_window: one of those the plan was made for.

    Returns:
        [T, N, D].
    """
    check_layer(kv_layer, plan)
    heads, head_dim = plan.geometry.num_kv_heads, plan.geometry.head_dim
    if query.dim() != 3 or query.shape[0] != plan.step.num_tokens or query.shape[1] % heads:
        raise KernelArgumentError(f"query must be [{plan.step.num_tokens}, n * {heads}, D], got {describe(query)}")
    if query.shape[2] != head_dim or query.dtype != plan.dtype or query.device != kv_layer.device:
        raise KernelArgumentError(f"query {describe(query)} does not fit the cache {describe(kv_layer)}")
    check_window(sliding_window, plan)
    return attention.paged_attention(query, kv_layer, plan, scale, sliding_window)


def attention_block(
    residual: Tensor,
    delta: Tensor | None,
    weights: AttentionWeights,
    spec: AttentionSpec,
    rotary: tuple[Tensor, Tensor],
    kv_layer: Tensor,
    plan: AttentionPlan,
) -> tuple[Tensor, Tensor]:
    """RMSNorm, QKV, norms of Q and K, rotary embedding, KV append, paged attention, output projection.

    Changes ``kv_layer``. The weights fit ``spec`` (``AttentionWeights.check``).

    Args:
        residual: float32[T, H].
        delta: [T, H], float32 or of the weights' dtype; None in front of the first layer.
        rotary: of ``rotary_cos_sin``.

    Returns:
        ``residual + delta``, and this block's output (a partial sum under tensor parallelism), as the arguments are.
    """
    check_rows(residual, plan.step.num_tokens)
    check_stream(residual, delta, weights.norm)
    check_layer(kv_layer, plan)
    check_window(spec.sliding_window, plan)
    if (spec.num_kv_heads, spec.head_dim) != (plan.geometry.num_kv_heads, plan.geometry.head_dim):
        raise KernelArgumentError(f"{spec} does not fit the cache {describe(kv_layer)}")
    if fused.takes_attention_block(residual, weights, spec, kv_layer, plan):
        return fused.attention_block(residual, delta, weights, spec, rotary, kv_layer, plan)
    return blocks.attention_block(residual, delta, weights, spec, rotary, kv_layer, plan)


def mlp_block(residual: Tensor, delta: Tensor | None, weights: MlpWeights, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm, gate and up projection, SiLU gate, down projection.

    Returns:
        As ``attention_block`` does.
    """
    check_rows(residual, residual.shape[0])
    check_stream(residual, delta, weights.norm)
    if fused.takes_mlp_block(residual, weights):
        return fused.mlp_block(residual, delta, weights, eps)
    return blocks.mlp_block(residual, delta, weights, eps)


def head(
    residual: Tensor, delta: Tensor | None, norm: Tensor, weight: Weight, logits_indices: Tensor, eps: float
) -> Tensor:
    """Logits of the wanted rows over a vocabulary shard: gather, RMSNorm, projection.

    Args:
        norm: [H].
        weight: [V, H].
        logits_indices: int64[S].

    Returns:
        float32[S, V].
    """
    check_rows(residual, residual.shape[0])
    check_stream(residual, delta, norm)
    check_linear("norm", norm, weight)
    check_index("logits_indices", logits_indices, residual)
    if fused.takes_head(weight, logits_indices):
        return fused.head(residual, delta, norm, weight, logits_indices, eps)
    return blocks.head(residual, delta, norm, weight, logits_indices, eps)


def head_candidates(
    residual: Tensor,
    delta: Tensor | None,
    norm: Tensor,
    weight: Weight,
    logits_indices: Tensor,
    num_candidates: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The best logits of the wanted rows, best first, with their vocabulary rows; of equal ones the lower row first.

    On a GPU without computing a row's other logits into memory. Arguments are those of ``head``.

    Returns:
        float32[S, num_candidates] and int32[S, num_candidates].
    """
    check_rows(residual, residual.shape[0])
    check_stream(residual, delta, norm)
    check_linear("norm", norm, weight)
    check_index("logits_indices", logits_indices, residual)
    if not 1 <= num_candidates <= weight.shape[0]:
        raise KernelArgumentError(f"{num_candidates} candidates of {weight.shape[0]} rows are not possible")
    if fused.takes_head(weight, logits_indices):
        return fused.head_candidates(residual, delta, norm, weight, logits_indices, num_candidates, eps)
    return blocks.head_candidates(residual, delta, norm, weight, logits_indices, num_candidates, eps)


def prepare_attention(weights: AttentionWeights, spec: AttentionSpec, kv_dtype: torch.dtype) -> AttentionWeights:
    """The weights in the form that this machine's ``attention_block`` is fastest with; call once, before any step.

    ``kv_dtype`` is that of the caches to come: with one of int8 torch computes on a GPU, which wants rows.

    The same bytes in another order: it may take the memory of those given, which are then not to be used any more.
    """
    return fused.prepare_attention(weights, spec, kv_dtype)


def prepare_mlp(weights: MlpWeights) -> MlpWeights:
    """Likewise for ``mlp_block``."""
    return fused.prepare_mlp(weights)


def prepare_head(weight: Weight, *, keep: bool) -> Weight:
    """Likewise for ``head``. ``keep``: others use the weight given, as tied embeddings do."""
    return fused.prepare_head(weight, keep=keep)


def packs_weights(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights prepared there may lie in an order of their own, so that steps take memory to unpack them in.

    Raises:
        LaunchError: ``FUSELINE_LAUNCHES`` names a file that is no table.
    """
    return fused.packs(dtype, device)
