"""Which calls of the ops a fused block takes, and how they are handed over.

A block takes packed weights, at most ``MAX_BATCH`` tokens, and for attention one new token a sequence. Weights are
packed when a model is loaded, if they are bfloat16 on a Hopper GPU, and exist in that form only: for everything else,
prompts first of all, torch unpacks a layer's weight into memory that the next layer takes again.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TypeGuard

import torch

from ..errors import KernelArgumentError
from ..packed import STEP_COLS, UNIT_ROWS, PackedWeight
from ..reference.attention_plan import AttentionPlan
from ..types import AttentionSpec, AttentionWeights, MlpWeights, Weight
from .arguments import MAX_BATCH
from .attention import HEAD_DIMS, MIN_BLOCK_SIZE
from .choices import default_table
from .launcher import CAPABILITY
from .library import native_library
from .ops import OPERATORS

Tensor = torch.Tensor


def takes_mlp_block(residual: Tensor, weights: MlpWeights) -> bool:
    """Whether ``mlp_block`` below computes this."""
    return residual.shape[0] <= MAX_BATCH and _packed(weights.gate_up) and _packed(weights.down)


def takes_attention_block(
    residual: Tensor, weights: AttentionWeights, spec: AttentionSpec, kv_layer: Tensor, plan: AttentionPlan
) -> bool:
    """Whether ``attention_block`` below computes this."""
    size = plan.geometry.block_size
    return (
        residual.shape[0] <= MAX_BATCH
        and plan.step.max_query_len == 1
        and spec.head_dim in HEAD_DIMS
        and size >= MIN_BLOCK_SIZE
        and size & (size - 1) == 0
        and kv_layer.dtype == torch.bfloat16
        and _packed(weights.qkv)
        and _packed(weights.out)
    )


def takes_head(weight: Weight, rows: Tensor) -> bool:
    """Whether ``head`` below computes this."""
    return 0 < rows.shape[0] <= MAX_BATCH and _packed(weight)


def mlp_block(residual: Tensor, delta: Tensor | None, weights: MlpWeights, eps: float) -> tuple[Tensor, Tensor]:
    """See ``ops.mlp_block``."""
    result: tuple[Tensor, Tensor] = OPERATORS.mlp_block(
        residual,
        _float32(delta),
        weights.norm,
        _data(weights.gate_up),
        weights.gate_up_bias,
        _data(weights.down),
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
    result: tuple[Tensor, Tensor] = OPERATORS.attention_block(
        residual,
        _float32(delta),
        weights.norm,
        _data(weights.qkv),
        weights.qkv_bias,
        weights.q_norm,
        weights.k_norm,
        _data(weights.out),
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
    result: Tensor = OPERATORS.head_logits(
        residual, _float32(delta), norm, _data(weight), weight.shape[0], logits_indices, eps
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
    result: tuple[Tensor, Tensor] = OPERATORS.head_candidates(
        residual, _float32(delta), norm, _data(weight), weight.shape[0], logits_indices, num_candidates, eps
    )
    return result


def prepare_attention(weights: AttentionWeights, spec: AttentionSpec, kv_dtype: torch.dtype) -> AttentionWeights:
    """See ``ops.prepare_attention``."""
    if (
        spec.head_dim not in HEAD_DIMS
        or kv_dtype != torch.bfloat16
        or not (_packable(weights.qkv) and _packable(weights.out))
    ):
        return weights
    return replace(weights, qkv=_pack(weights.qkv, spec.head_dim), out=_pack(weights.out))


def prepare_mlp(weights: MlpWeights) -> MlpWeights:
    """See ``ops.prepare_mlp``."""
    gate_up, down = weights.gate_up, weights.down
    if not (_packable(gate_up) and _packable(down)):
        return weights
    return replace(weights, gate_up=_pack(gate_up, gate_up.shape[0]), down=_pack(down))


def prepare_head(weight: Weight, *, keep: bool) -> Weight:
    """See ``ops.prepare_head``."""
    return _pack(weight, keep=keep) if _packable(weight) else weight


def packs(dtype: torch.dtype, device: torch.device) -> bool:
    """See ``ops.packs_weights``."""
    return dtype == torch.bfloat16 and _usable(device)


@cache
def _usable(device: torch.device) -> bool:
    """A Hopper GPU, and kernels for it.

    Raises:
        LaunchError: ``FUSELINE_LAUNCHES`` names a file that is no table: told while loading, not at the first decode.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != CAPABILITY or native_library() is None:
        return False
    default_table()
    return True


def _packable(weight: Weight) -> TypeGuard[Tensor]:
    """A weight whose columns the CTAs of a cluster can share, on a GPU that has kernels for it.

    Rows need no look: those of one weight of a block are columns of the other, or whole heads. Stacked weights are a
    mapped checkpoint's, which only a CPU computes from.
    """
    return (
        isinstance(weight, Tensor) and weight.shape[1] % (2 * STEP_COLS) == 0 and packs(weight.dtype, weight.device)
    )


def _pack(weight: Tensor, group_rows: int = UNIT_ROWS, *, keep: bool = False) -> PackedWeight:
    """Waits for the packing: a block begins to read weights before the kernel ahead of it has ended."""
    packed = PackedWeight.of(weight.contiguous(), group_rows, keep=keep)
    if packed.device.type == "cuda":
        torch.cuda.synchronize(packed.device)
    return packed


def _packed(weight: Weight) -> bool:
    return isinstance(weight, PackedWeight)


def _data(weight: Weight) -> Tensor:
    """What the kernels read; the caller has asked whether a block takes the weight."""
    if not isinstance(weight, PackedWeight):
        raise KernelArgumentError(f"a fused block takes packed weights, not {type(weight).__name__}")
    return weight.data


def _float32(delta: Tensor | None) -> Tensor | None:
    return None if delta is None else delta.float()
