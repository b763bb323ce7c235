"""What the launchers of ops have in common: arguments that do not fit are refused before anything is computed.

All raise KernelArgumentError, naming what was expected and what came.
"""

from __future__ import annotations

import torch

from .errors import KernelArgumentError
from .packed import PackedWeight
from .quantized import QuantizedWeight
from .reference.attention_plan import AttentionPlan, KvGeometry
from .stacked import StackedWeight
from .types import FLOAT_DTYPES, StepMetadata, Weight

Tensor = torch.Tensor


def describe(tensor: Tensor) -> str:
    """Shape, dtype and device, for a message."""
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"


def check_dims(name: str, tensor: Tensor, dims: int) -> None:
    """A float tensor of so many dimensions."""
    if tensor.dim() != dims or tensor.dtype not in FLOAT_DTYPES:
        raise KernelArgumentError(f"{name} must be a float tensor of {dims} dimensions, got {describe(tensor)}")


def check_index(name: str, index: Tensor, beside: Tensor) -> None:
    """int64[n] on the device of ``beside``."""
    if index.dim() != 1 or index.dtype != torch.int64 or index.device != beside.device:
        raise KernelArgumentError(f"{name} must be int64[n] on {beside.device}, got {describe(index)}")


def check_last(name: str, x: Tensor, weight: Tensor) -> None:
    """``x`` [..., n] of the dtype of ``weight`` [..., n]."""
    check_width(name, x, weight)
    if x.dtype != weight.dtype:
        raise KernelArgumentError(f"{name} {describe(x)} does not fit the weight {describe(weight)}")


def check_linear(name: str, x: Tensor, weight: Weight) -> None:
    """``x`` [..., in] for a weight [out, in]: of its dtype, or of any float type if it is quantised."""
    if isinstance(weight, PackedWeight):
        if (x.shape[-1], x.dtype, x.device) != (weight.shape[1], weight.dtype, weight.device):
            raise KernelArgumentError(f"{name} {describe(x)} does not fit a packed weight {weight.shape}")
    elif not isinstance(weight, QuantizedWeight):
        part = weight.parts[0] if isinstance(weight, StackedWeight) else weight
        check_dims("weight", part, 2)
        check_last(name, x, part)
    elif x.shape[-1] != weight.cols or x.device != weight.device or x.dtype not in FLOAT_DTYPES:
        raise KernelArgumentError(f"{name} {describe(x)} does not fit a weight {weight.shape} of int{weight.bits}")


def check_width(name: str, x: Tensor, weight: Tensor) -> None:
    """``x`` [..., n], float32 or of the dtype of ``weight`` [..., n]."""
    if x.shape[-1] != weight.shape[-1] or x.device != weight.device or weight.dtype not in FLOAT_DTYPES:
        raise KernelArgumentError(f"{name} {describe(x)} does not fit the weight {describe(weight)}")
    if x.dtype not in (torch.float32, weight.dtype):
        raise KernelArgumentError(f"{name} must be float32 or {weight.dtype}, got {describe(x)}")


def check_rows(residual: Tensor, num_tokens: int) -> None:
    """A residual [num_tokens, H]."""
    if residual.dim() != 2 or residual.shape[0] != num_tokens:
        raise KernelArgumentError(f"residual must be [{num_tokens}, H], got {describe(residual)}")


def check_stream(residual: Tensor, delta: Tensor | None, norm: Tensor) -> None:
    """A float32 residual and a delta that fit a norm's weight [H]."""
    if residual.dtype != torch.float32:
        raise KernelArgumentError(f"the residual stream is float32, got {describe(residual)}")
    check_width("residual", residual, norm)
    if delta is None:
        return
    if delta.shape != residual.shape:
        raise KernelArgumentError(f"delta {describe(delta)} does not fit {describe(residual)}")
    check_width("delta", delta, norm)


def check_window(window: int | None, plan: AttentionPlan) -> None:
    """One that the plan was made for."""
    if window not in plan.windows:
        raise KernelArgumentError(f"the plan was made for windows {set(plan.windows)}, not {window}")


def check_layer(kv_layer: Tensor, plan: AttentionPlan) -> None:
    """A layer's cache of the geometry that the plan was made for, in the dtype of its queries or in int8."""
    if kv_layer.dim() != 5 or kv_layer.shape[0] != 2 or not kv_layer.is_contiguous():
        raise KernelArgumentError(f"a layer's cache is contiguous [2, blocks, K, size, D], got {describe(kv_layer)}")
    if KvGeometry.of(kv_layer) != plan.geometry:
        raise KernelArgumentError(f"the plan was made for {plan.geometry}, the cache is {describe(kv_layer)}")
    if kv_layer.dtype not in (plan.dtype, torch.int8):
        raise KernelArgumentError(f"queries of {plan.dtype} need a cache of that or int8, got {describe(kv_layer)}")


def check_step(step: StepMetadata, kv_cache: Tensor) -> None:
    """A step's metadata fits itself and the cache [layers, 2, num_blocks, K, block_size, D]."""
    num_tokens, num_seqs, device = step.num_tokens, step.num_seqs, kv_cache.device
    if kv_cache.dim() != 6 or kv_cache.shape[1] != 2:
        raise KernelArgumentError(f"the cache must be [layers, 2, blocks, K, size, D], got {describe(kv_cache)}")
    expected = (
        ("positions", step.positions, (num_tokens,), torch.int64),
        ("slot_mapping", step.slot_mapping, (num_tokens,), torch.int64),
        ("query_start", step.query_start, (num_seqs + 1,), torch.int32),
        ("context_lens", step.context_lens, (num_seqs,), torch.int32),
        ("block_tables", step.block_tables, (num_seqs, step.block_tables.shape[-1]), torch.int32),
    )
    for name, tensor, shape, dtype in expected:
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device:
            raise KernelArgumentError(f"{name} must be {shape} {dtype} on {device}, got {describe(tensor)}")
    check_lengths(step, kv_cache.shape[4])


def check_lengths(step: StepMetadata, block_size: int) -> None:
    """The part of ``check_step`` that looks at values, for a step whose tensors are those of one that was checked."""
    num_tokens, num_seqs = step.num_tokens, step.num_seqs
    starts, context_lens = step.query_start_host, step.context_lens_host
    if starts.shape != (num_seqs + 1,) or context_lens.shape != (num_seqs,) or num_seqs == 0:
        raise KernelArgumentError(f"host metadata has {context_lens.shape[0]} sequences, the device's {num_seqs}")
    query_lens = starts[1:] - starts[:-1]
    if starts[0] != 0 or starts[-1] != num_tokens or query_lens.min() < 1 or (context_lens < query_lens).any():
        raise KernelArgumentError(
            f"query_start {starts} and context_lens {context_lens} do not fit {num_tokens} tokens"
        )
    room = step.block_tables.shape[-1] * block_size
    if context_lens.max() != step.max_context_len or query_lens.max() != step.max_query_len:
        raise KernelArgumentError("max_query_len or max_context_len is not the maximum of the host metadata")
    if step.max_context_len > room:
        raise KernelArgumentError(f"max_context_len={step.max_context_len} is more than block tables hold: {room}")
