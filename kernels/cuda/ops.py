"""The fused blocks as torch operators ``torch.ops.fuseline.*``: on a GPU the kernels, on a CPU their reference twins.

An operator declares what it changes and has a fake version, so that torch.compile and CUDA graphs see through it. The
CPU version takes the same packed arguments, unpacks them and computes with ``kernels.reference``: it says what the
kernel must compute, and lets all of the code around the kernels be tested without a GPU.
"""

from __future__ import annotations

from typing import Any

import torch

from ..packed import UNIT_ROWS, unpack
from ..reference import attention_plan, blocks
from ..reference.attention_plan import KvGeometry
from ..types import AttentionSpec, AttentionWeights, MlpWeights, StepMetadata
from . import attention, head, mlp
from .attention import AttentionTensors
from .launcher import default_launcher

Tensor = torch.Tensor

SCHEMAS = (
    "mlp_block(Tensor residual, Tensor? delta, Tensor norm, Tensor gate_up, Tensor? gate_up_bias, Tensor down,"
    " Tensor? down_bias, float eps) -> (Tensor, Tensor)",
    "attention_block(Tensor residual, Tensor? delta, Tensor norm, Tensor qkv, Tensor? qkv_bias, Tensor? q_norm,"
    " Tensor? k_norm, Tensor out, Tensor? out_bias, Tensor cos, Tensor sin, Tensor(a!) kv, Tensor block_tables,"
    " Tensor context_lens, float scale, float eps, int window) -> (Tensor, Tensor)",
    "head_logits(Tensor residual, Tensor? delta, Tensor norm, Tensor weight, int vocab, Tensor rows, float eps)"
    " -> Tensor",
    "head_candidates(Tensor residual, Tensor? delta, Tensor norm, Tensor weight, int vocab, Tensor rows,"
    " int num_candidates, float eps) -> (Tensor, Tensor)",
)

# The dispatcher passes all arguments by position, those left out with their defaults.


def _mlp_cuda(residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return mlp.mlp_block(default_launcher(), residual, *rest)


def _mlp_cpu(residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    delta, norm, gate_up, gate_up_bias, down, down_bias, eps = rest
    mlp.check_mlp(residual, delta, norm, gate_up, gate_up_bias, down, down_bias)
    num_rows = gate_up.shape[0] * UNIT_ROWS
    gate_up = unpack(gate_up, num_rows, group_rows=num_rows)
    weights = MlpWeights(norm, gate_up, unpack(down, residual.shape[1]), gate_up_bias, down_bias)
    total, out = blocks.mlp_block(residual, delta, weights, eps)
    return _fresh(total, residual), out.float()


def _attention_cuda(residual: Tensor, delta: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    *tensors, scale, eps, window = rest
    return attention.attention_block(
        default_launcher(), residual, delta, AttentionTensors(*tensors), scale, eps, window
    )


def _attention_cpu(residual: Tensor, delta: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    *given, scale, eps, window = rest
    tensors = AttentionTensors(*given)
    attention.check_attention(residual, delta, tensors, window)
    kv = tensors.kv
    spec = AttentionSpec(tensors.num_heads, kv.shape[2], kv.shape[4], scale, eps, window or None)
    qkv = unpack(tensors.qkv, tensors.qkv.shape[0] * UNIT_ROWS, group_rows=spec.head_dim)
    out = unpack(tensors.out, residual.shape[1])
    weights = AttentionWeights(
        tensors.norm, qkv, out, tensors.qkv_bias, tensors.q_norm, tensors.k_norm, tensors.out_bias
    )
    step = _decode_step(tensors.block_tables, tensors.context_lens, kv.shape[3])
    plan = attention_plan.plan_attention(step, KvGeometry.of(kv), [spec.sliding_window], kv.dtype)
    total, out = blocks.attention_block(residual, delta, weights, spec, (tensors.cos, tensors.sin), kv, plan)
    return _fresh(total, residual), out.float()


def _stream_fake(residual: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(residual), torch.empty_like(residual)


def _logits_cuda(residual: Tensor, *rest: Any) -> Tensor:
    return head.head_logits(default_launcher(), residual, *rest)


def _logits_cpu(residual: Tensor, *rest: Any) -> Tensor:
    delta, norm, weight, vocab, rows, eps = rest
    head.check_head(residual, delta, norm, weight, vocab, rows, 0)
    return blocks.head(residual, delta, norm, unpack(weight, vocab), rows, eps).float()


def _logits_fake(residual: Tensor, *rest: Any) -> Tensor:
    _, _, _, vocab, rows, _ = rest
    return residual.new_empty(rows.shape[0], vocab)


def _candidates_cuda(residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return head.head_candidates(default_launcher(), residual, *rest)


def _candidates_cpu(residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    delta, norm, weight, vocab, rows, num_candidates, eps = rest
    head.check_head(residual, delta, norm, weight, vocab, rows, num_candidates)
    return blocks.head_candidates(residual, delta, norm, unpack(weight, vocab), rows, num_candidates, eps)


def _candidates_fake(residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _, _, _, _, rows, num_candidates, _ = rest
    shape = (rows.shape[0], num_candidates)
    return residual.new_empty(shape), residual.new_empty(shape, dtype=torch.int32)


IMPLEMENTATIONS: dict[str, tuple[Any, Any, Any]] = {
    "mlp_block": (_mlp_cuda, _mlp_cpu, _stream_fake),
    "attention_block": (_attention_cuda, _attention_cpu, _stream_fake),
    "head_logits": (_logits_cuda, _logits_cpu, _logits_fake),
    "head_candidates": (_candidates_cuda, _candidates_cpu, _candidates_fake),
}


def _fresh(total: Tensor, residual: Tensor) -> Tensor:
    """An operator's result may not be one of its arguments."""
    return total.clone() if total is residual else total


def _decode_step(block_tables: Tensor, context_lens: Tensor, block_size: int) -> StepMetadata:
    """The metadata of one new token a sequence, which the kernel has no need of."""
    batch = context_lens.shape[0]
    last = context_lens.long() - 1
    blocks_of_last = block_tables.long().gather(1, (last // block_size)[:, None])[:, 0]
    starts = torch.arange(batch + 1, dtype=torch.int32)
    lens = context_lens.numpy()
    return StepMetadata(
        positions=last,
        slot_mapping=blocks_of_last * block_size + last % block_size,
        query_start=starts,
        context_lens=context_lens,
        block_tables=block_tables,
        query_start_host=starts.numpy(),
        context_lens_host=lens,
        max_query_len=1,
        max_context_len=int(lens.max()),
    )


def _register() -> torch.library.Library:
    library = torch.library.Library("fuseline", "DEF")  # type: ignore[no-untyped-call]
    for schema in SCHEMAS:
        library.define(schema)  # type: ignore[no-untyped-call]
    for name, implementations in IMPLEMENTATIONS.items():
        for key, implementation in zip(("CUDA", "CPU", "Meta"), implementations, strict=True):
            library.impl(name, implementation, key)  # type: ignore[no-untyped-call]
    return library


_library = _register()  # operators live as long as this
OPERATORS = torch.ops.fuseline
