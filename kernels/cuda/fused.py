"""Which calls of the ops a fused block takes, and how they are handed over.

A block takes float (not quantised) bfloat16 weights on a Hopper GPU, at most ``MAX_BATCH`` tokens, and for attention
one new token a sequence. Everything else is torch's.
"""

from __future__ import annotations

from functools import cache

import torch

from ..reference.attention_plan import AttentionPlan
from ..types import AttentionSpec, AttentionWeights, MlpWeights, Weight, float_weight
from .arguments import MAX_BATCH
from .attention import HEAD_DIMS, MIN_BLOCK_SIZE
from .launcher import CAPABILITY
from .library import native_library
from .ops import OPERATORS
from .weights import packed_attention, packed_mlp, packed_table

Tensor = torch.Tensor


def takes_mlp_block(residual: Tensor, weights: MlpWeights) -> bool:
    """Whether ``mlp_block`` below computes this."""
    return _takes(residual) and _dense(weights.gate_up) and _dense(weights.down)


def takes_attention_block(
    residual: Tensor, weights: AttentionWeights, spec: AttentionSpec, kv_layer: Tensor, plan: AttentionPlan
) -> bool:
    """Whether ``attention_block`` below computes this."""
    size = plan.geometry.block_size
    return (
        _takes(residual)
        and plan.step.max_query_len == 1
        and spec.head_dim in HEAD_DIMS
        and size >= MIN_BLOCK_SIZE
        and size & (size - 1) == 0
        and kv_layer.dtype == torch.bfloat16
        and _dense(weights.qkv)
        and _dense(weights.out)
    )


def takes_head(residual: Tensor, weight: Weight, rows: Tensor) -> bool:
    """Whether ``head`` below computes this."""
    return _usable(residual.device) and 0 < rows.shape[0] <= MAX_BATCH and _dense(weight)


def mlp_block(residual: Tensor, delta: Tensor | None, weights: MlpWeights, eps: float) -> tuple[Tensor, Tensor]:
    """See ``ops.mlp_block``."""
    packed = packed_mlp(weights)
    result: tuple[Tensor, Tensor] = OPERATORS.mlp_block(
        residual,
        _float32(delta),
        weights.norm,
        packed.gate_up,
        weights.gate_up_bias,
        packed.down,
        weights.down_bias,
        eps,
    )
    return result


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
    packed = packed_attention(weights, spec.head_dim)
    result: tuple[Tensor, Tensor] = OPERATORS.attention_block(
        residual,
        _float32(delta),
        weights.norm,
        packed.qkv,
        weights.qkv_bias,
        weights.q_norm,
        weights.k_norm,
        packed.out,
        weights.out_bias,
        *rotary,
        kv_layer,
        plan.step.block_tables,
        plan.step.context_lens,
        spec.scale,
        spec.eps,
        spec.sliding_window or 0,
    )
    return result


def head(
    residual: Tensor, delta: Tensor | None, norm: Tensor, weight: Weight, logits_indices: Tensor, eps: float
) -> Tensor:
    """See ``ops.head``."""
    table = packed_table(float_weight(weight))
    result: Tensor = OPERATORS.head_logits(
        residual, _float32(delta), norm, table, weight.shape[0], logits_indices, eps
    )
    return result


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
    table = packed_table(float_weight(weight))
    result: tuple[Tensor, Tensor] = OPERATORS.head_candidates(
        residual, _float32(delta), norm, table, weight.shape[0], logits_indices, num_candidates, eps
    )
    return result


def prepare(attention: AttentionWeights, mlp: MlpWeights, spec: AttentionSpec) -> None:
    """Pack a layer's weights now, if fused blocks will take them: before memory is counted for the KV cache."""
    if _usable(attention.norm.device):
        if _dense(attention.qkv) and _dense(attention.out) and spec.head_dim in HEAD_DIMS:
            packed_attention(attention, spec.head_dim)
        if _dense(mlp.gate_up) and _dense(mlp.down):
            packed_mlp(mlp)


def prepare_head(weight: Weight) -> None:
    """Likewise for a head's table."""
    if isinstance(weight, Tensor) and _usable(weight.device) and _dense(weight):
        packed_table(weight)


def _takes(residual: Tensor) -> bool:
    return _usable(residual.device) and residual.shape[0] <= MAX_BATCH


@cache
def _usable(device: torch.device) -> bool:
    """A Hopper GPU, and kernels for it."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) == CAPABILITY
        and native_library() is not None
    )


def _dense(weight: Weight) -> bool:
    """A weight that packs into whole units and slices."""
    return (
        isinstance(weight, Tensor)
        and weight.dtype == torch.bfloat16
        and weight.shape[1] % 32 == 0
        and weight.is_contiguous()
    )


def _float32(delta: Tensor | None) -> Tensor | None:
    return None if delta is None else delta.float()
