"""The fused attention block: arguments checked, then launched."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

import torch

from ..errors import KernelArgumentError
from .arguments import MAX_BATCH, check_batch, check_block_tables, check_optional, check_packed, check_tensor
from .launch import Problem
from .launcher import Launcher, of_rows, set_pointers
from .library import CudaLibrary

Tensor = torch.Tensor
HEAD_DIMS = (64, 128)
MIN_BLOCK_SIZE = 8


@dataclass(frozen=True, slots=True)
class AttentionTensors:
    """Weights and inputs of an attention block but the residual stream.

    Attributes:
        norm: bfloat16[H].
        qkv: packed [(N + 2K) * D, H], the halves of each head interleaved.
        qkv_bias: bfloat16[(N + 2K) * D], in the model's order.
        q_norm, k_norm: bfloat16[D], both or neither.
        out: packed [H, N * D].
        out_bias: bfloat16[H].
        cos, sin: float32[T, D / 2].
        kv: bfloat16[2, num_blocks, K, block_size, D].
        block_tables: int32[T, W]; entries past a context are not read.
        context_lens: int32[T], the new token included.
    """

    norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    cos: Tensor
    sin: Tensor
    kv: Tensor
    block_tables: Tensor
    context_lens: Tensor

    @property
    def num_heads(self) -> int:
        """N, by the columns of the output projection."""
        return self.out.shape[1] * 16 // self.kv.shape[4]


def check_attention(residual: Tensor, delta: Tensor | None, tensors: AttentionTensors, window: int) -> None:
    """Refuse arguments that do not fit one another or the kernel.

    The values of block tables and context lengths are looked at, which waits for the device, only when the
    environment variable ``FUSELINE_CHECK_KV`` is set.

    Raises:
        KernelArgumentError: naming what was expected and what came.
    """
    batch, hidden = check_batch(residual, delta, MAX_BATCH)
    _check_cache(tensors, batch, residual.device, window)
    _check_weights(tensors, hidden, residual.device)
    half = tensors.kv.shape[4] // 2
    check_tensor("cos", tensors.cos, (batch, half), torch.float32, residual.device)
    check_tensor("sin", tensors.sin, (batch, half), torch.float32, residual.device)


def _check_cache(tensors: AttentionTensors, batch: int, device: torch.device, window: int) -> None:
    kv = tensors.kv
    check_tensor("kv", kv, tuple(kv.shape), torch.bfloat16, device)
    if kv.dim() != 5 or kv.shape[0] != 2 or kv.shape[4] not in HEAD_DIMS:
        raise KernelArgumentError(f"kv must be [2, blocks, K, size, 64 or 128], got {tuple(kv.shape)}")
    num_blocks, block_size, width = kv.shape[1], kv.shape[3], tensors.block_tables.shape[-1]
    if block_size < MIN_BLOCK_SIZE or block_size & (block_size - 1):
        raise KernelArgumentError(f"the block size must be a power of two from 8 on, got {block_size}")
    if not 1 <= width * block_size <= torch.iinfo(torch.int32).max:
        raise KernelArgumentError(f"block tables of {width} blocks of {block_size} tokens are not possible")
    if window < 0:
        raise KernelArgumentError(f"the window must be 0, for none, or more, got {window}")
    check_tensor("block_tables", tensors.block_tables, (batch, width), torch.int32, device)
    check_tensor("context_lens", tensors.context_lens, (batch,), torch.int32, device)
    if os.environ.get("FUSELINE_CHECK_KV") and device.type != "meta":
        check_block_tables(tensors.block_tables, tensors.context_lens, block_size, num_blocks)


def _check_weights(tensors: AttentionTensors, hidden: int, device: torch.device) -> None:
    kv_heads, head_dim = tensors.kv.shape[2], tensors.kv.shape[4]
    if tensors.out.dim() != 4 or tensors.num_heads < 1 or tensors.num_heads % kv_heads:
        raise KernelArgumentError(f"out {tuple(tensors.out.shape)} has no multiple of {kv_heads} heads")
    rows = (tensors.num_heads + 2 * kv_heads) * head_dim
    check_tensor("norm", tensors.norm, (hidden,), torch.bfloat16, device)
    check_packed("qkv", tensors.qkv, rows, hidden, device)
    check_optional("qkv_bias", tensors.qkv_bias, (rows,), torch.bfloat16, device)
    if (tensors.q_norm is None) != (tensors.k_norm is None):
        raise KernelArgumentError("q_norm and k_norm come together or not at all")
    check_optional("q_norm", tensors.q_norm, (head_dim,), torch.bfloat16, device)
    check_optional("k_norm", tensors.k_norm, (head_dim,), torch.bfloat16, device)
    check_packed("out", tensors.out, hidden, tensors.num_heads * head_dim, device)
    check_optional("out_bias", tensors.out_bias, (hidden,), torch.bfloat16, device)


def attention_problem(
    library: CudaLibrary,
    hidden: int,
    num_heads: int,
    kv_shape: tuple[int, ...],
    table_width: int,
    *,
    scale: float,
    eps: float,
    window: int,
) -> Problem:
    """The block of these sizes, over a cache [2, num_blocks, K, block_size, D]."""
    _, num_blocks, kv_heads, block_size, head_dim = kv_shape

    def arguments(batch: int) -> ctypes.Structure:
        return library.arguments(
            "fl_attention_args",
            batch=batch,
            hidden=hidden,
            num_heads=num_heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            table_width=table_width,
            window=window,
            scale=scale,
            eps=eps,
            num_blocks=num_blocks,
        )

    dims = (hidden, num_heads, kv_heads, head_dim, block_size, table_width)
    phases = (((num_heads + 2 * kv_heads) * head_dim, hidden), (hidden, num_heads * head_dim))
    return Problem("attention", "fl_cuda_attention_block", dims, phases, arguments)


def attention_block(
    launcher: Launcher,
    residual: Tensor,
    delta: Tensor | None,
    tensors: AttentionTensors,
    scale: float,
    eps: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """The attention block of one new token a sequence; returns as ``ops.attention_block`` does. Changes the cache.

    Args:
        residual, delta: float32[T, H], T at most ``MAX_BATCH``.
        scale: of the scores.
        eps: of the norms.
        window: tokens that a query sees, itself included; 0 for all.

    Raises:
        KernelArgumentError: the arguments do not fit.
        LaunchError: the device cannot run the kernel.
    """
    check_attention(residual, delta, tensors, window)
    problem = attention_problem(
        launcher.library,
        residual.shape[1],
        tensors.num_heads,
        tuple(tensors.kv.shape),
        tensors.block_tables.shape[1],
        scale=scale,
        eps=eps,
        window=window,
    )
    total, out = torch.empty_like(residual), torch.empty_like(residual)
    for rows, args in launcher.launch(problem, residual.shape[0], residual.device):
        set_pointers(
            args,
            residual=residual[rows],
            delta=of_rows(delta, rows),
            norm=tensors.norm,
            qkv=tensors.qkv,
            qkv_bias=tensors.qkv_bias,
            q_norm=tensors.q_norm,
            k_norm=tensors.k_norm,
            out=tensors.out,
            out_bias=tensors.out_bias,
            rotary_cos=tensors.cos[rows],
            rotary_sin=tensors.sin[rows],
            kv=tensors.kv,
            block_tables=tensors.block_tables[rows],
            context_lens=tensors.context_lens[rows],
            residual_out=total[rows],
            delta_out=out[rows],
        )
    return total, out
