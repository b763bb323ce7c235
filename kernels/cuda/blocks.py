"""Launchers of the fused blocks: all arguments checked, outputs allocated, the kernels queued on the current stream.

Weights are packed (``packing``, ``weights``). Residual and delta are float32 [T, H], as everywhere. None of these
waits for the device; all can be captured in a CUDA graph once they have run on the stream.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import KernelArgumentError, LaunchError
from .arguments import check_batch, check_block_tables, check_optional, check_packed, check_tensor
from .launch import Launch, Problem, Scratch, plan_launch
from .library import CudaLibrary

Tensor = torch.Tensor
HEAD_DIMS = (64, 128)
CAPABILITY = (9, 0)
MAX_LAUNCHES = 4096
# More tokens than any call may have; a call of more than fit one launch is cut.
MAX_BATCH = 64


@dataclass(frozen=True, slots=True)
class AttentionTensors:
    """Weights and inputs of an attention block but the residual stream; see ``fl_attention_args``."""

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


def check_mlp(
    residual: Tensor,
    delta: Tensor | None,
    norm: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
) -> None:
    """Refuse arguments of an MLP block that do not fit one another or the kernel.

    Raises:
        KernelArgumentError: naming what was expected and what came.
    """
    _, hidden = check_batch(residual, delta, MAX_BATCH)
    inner, device = down.shape[1] * 16 if down.dim() == 4 else 0, residual.device
    check_tensor("norm", norm, (hidden,), torch.bfloat16, device)
    check_packed("down", down, hidden, inner, device)
    check_packed("gate_up", gate_up, 2 * inner, hidden, device)
    check_optional("gate_up_bias", gate_up_bias, (2 * inner,), torch.bfloat16, device)
    check_optional("down_bias", down_bias, (hidden,), torch.bfloat16, device)


def check_attention(residual: Tensor, delta: Tensor | None, tensors: AttentionTensors, window: int) -> None:
    """Likewise of an attention block.

    Raises:
        KernelArgumentError: naming what was expected and what came.
    """
    batch, hidden = check_batch(residual, delta, MAX_BATCH)
    device, kv = residual.device, tensors.kv
    if kv.dim() != 5 or kv.shape[0] != 2 or kv.shape[4] not in HEAD_DIMS:
        raise KernelArgumentError(f"kv must be [2, blocks, K, size, 64 or 128], got {tuple(kv.shape)}")
    _, num_blocks, kv_heads, block_size, head_dim = kv.shape
    if block_size < 8 or block_size & (block_size - 1):
        raise KernelArgumentError(f"the block size must be a power of two from 8 on, got {block_size}")
    if tensors.out.dim() != 4 or tensors.num_heads < 1 or tensors.num_heads % kv_heads:
        raise KernelArgumentError(f"out {tuple(tensors.out.shape)} has no multiple of {kv_heads} heads")
    if window < 0:
        raise KernelArgumentError(f"the window must be 0, for none, or more, got {window}")
    rows = (tensors.num_heads + 2 * kv_heads) * head_dim
    check_tensor("kv", kv, tuple(kv.shape), torch.bfloat16, device)
    check_tensor("norm", tensors.norm, (hidden,), torch.bfloat16, device)
    check_packed("qkv", tensors.qkv, rows, hidden, device)
    check_optional("qkv_bias", tensors.qkv_bias, (rows,), torch.bfloat16, device)
    if (tensors.q_norm is None) != (tensors.k_norm is None):
        raise KernelArgumentError("q_norm and k_norm come together or not at all")
    check_optional("q_norm", tensors.q_norm, (head_dim,), torch.bfloat16, device)
    check_optional("k_norm", tensors.k_norm, (head_dim,), torch.bfloat16, device)
    check_packed("out", tensors.out, hidden, tensors.num_heads * head_dim, device)
    check_optional("out_bias", tensors.out_bias, (hidden,), torch.bfloat16, device)
    check_tensor("cos", tensors.cos, (batch, head_dim // 2), torch.float32, device)
    check_tensor("sin", tensors.sin, (batch, head_dim // 2), torch.float32, device)
    width = tensors.block_tables.shape[-1]
    if width < 1 or width * block_size > torch.iinfo(torch.int32).max:
        raise KernelArgumentError(f"block tables of {width} blocks of {block_size} tokens are not possible")
    check_tensor("block_tables", tensors.block_tables, (batch, width), torch.int32, device)
    check_tensor("context_lens", tensors.context_lens, (batch,), torch.int32, device)
    if os.environ.get("FUSELINE_CHECK_KV") and device.type != "meta":
        check_block_tables(tensors.block_tables, tensors.context_lens, block_size, num_blocks)


class Blocks:
    """The fused blocks of one library, with what was chosen and allocated for them."""

    def __init__(self, library: CudaLibrary) -> None:
        self._library = library
        self._scratch = Scratch()
        self._launches: dict[tuple[Any, ...], Launch] = {}

    def mlp_block(
        self,
        residual: Tensor,
        delta: Tensor | None,
        norm: Tensor,
        gate_up: Tensor,
        gate_up_bias: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """RMSNorm, gate and up, SwiGLU, down; see ``ops.mlp_block``.

        Args:
            gate_up: packed [2 * I, H], gate and up interleaved.
            down: packed [H, I].

        Raises:
            KernelArgumentError: the arguments do not fit.
            LaunchError: the device cannot run the kernel.
        """
        check_mlp(residual, delta, norm, gate_up, gate_up_bias, down, down_bias)
        hidden, inner = residual.shape[1], down.shape[1] * 16

        def arguments(batch: int) -> ctypes.Structure:
            return self._library.arguments("fl_mlp_args", batch=batch, hidden=hidden, inner=inner, eps=eps)

        problem = Problem("mlp", ((2 * inner, hidden), (hidden, inner)), arguments)
        total, out = torch.empty_like(residual), torch.empty_like(residual)
        with _on(residual.device):
            for rows, args in self._parts(problem, (hidden, inner), residual):
                _fill(
                    args,
                    residual=residual[rows],
                    delta=None if delta is None else delta[rows],
                    norm=norm,
                    gate_up=gate_up,
                    gate_up_bias=gate_up_bias,
                    down=down,
                    down_bias=down_bias,
                    residual_out=total[rows],
                    delta_out=out[rows],
                )
                self._library.launch("fl_cuda_mlp_block", ctypes.byref(args))
        return total, out

    def attention_block(
        self,
        residual: Tensor,
        delta: Tensor | None,
        tensors: AttentionTensors,
        scale: float,
        eps: float,
        window: int,
    ) -> tuple[Tensor, Tensor]:
        """The attention block of one new token a sequence; see ``ops.attention_block``. Changes ``tensors.kv``.

        Args:
            window: tokens that a query sees, 0 for all.

        Raises:
            KernelArgumentError: the arguments do not fit.
            LaunchError: the device cannot run the kernel.
        """
        check_attention(residual, delta, tensors, window)
        kv = tensors.kv
        _, num_blocks, kv_heads, block_size, head_dim = kv.shape
        hidden, width = residual.shape[1], tensors.block_tables.shape[1]
        heads = tensors.num_heads

        def arguments(batch: int) -> ctypes.Structure:
            return self._library.arguments(
                "fl_attention_args",
                batch=batch,
                hidden=hidden,
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=head_dim,
                block_size=block_size,
                table_width=width,
                window=window,
                scale=scale,
                eps=eps,
                num_blocks=num_blocks,
            )

        rows_of_qkv = (heads + 2 * kv_heads) * head_dim
        problem = Problem("attention", ((rows_of_qkv, hidden), (hidden, heads * head_dim)), arguments)
        total, out = torch.empty_like(residual), torch.empty_like(residual)
        with _on(residual.device):
            for rows, args in self._parts(problem, (hidden, heads, kv_heads, head_dim, width, block_size), residual):
                _fill(
                    args,
                    residual=residual[rows],
                    delta=None if delta is None else delta[rows],
                    norm=tensors.norm,
                    qkv=tensors.qkv,
                    qkv_bias=tensors.qkv_bias,
                    q_norm=tensors.q_norm,
                    k_norm=tensors.k_norm,
                    out=tensors.out,
                    out_bias=tensors.out_bias,
                    rotary_cos=tensors.cos[rows],
                    rotary_sin=tensors.sin[rows],
                    kv=kv,
                    block_tables=tensors.block_tables[rows],
                    context_lens=tensors.context_lens[rows],
                    residual_out=total[rows],
                    delta_out=out[rows],
                )
                self._library.launch("fl_cuda_attention_block", ctypes.byref(args))
        return total, out

    def _parts(
        self, problem: Problem, dims: tuple[int, ...], residual: Tensor
    ) -> Iterator[tuple[slice, ctypes.Structure]]:
        """The rows of each launch that a batch takes, and its arguments but the pointers to tensors."""
        batch, device = residual.shape[0], residual.device
        launch = self._launch(problem, dims, batch, device)
        num_bytes = self._library.call(
            f"fl_cuda_{problem.name}_workspace", ctypes.byref(self._sized(problem, launch))
        )
        scratch = self._scratch.get((problem.name, *dims), num_bytes, device)
        stream = torch.cuda.current_stream(device).cuda_stream
        for first in range(0, batch, launch.max_batch):
            rows = slice(first, min(first + launch.max_batch, batch))
            args = problem.arguments(rows.stop - rows.start)
            args.launch = self._library.header.structs["fl_launch"](
                launch.cluster, launch.num_clusters, launch.stages, 1
            )
            args.workspace, args.stream = scratch.data_ptr(), stream
            yield rows, args

    def _launch(self, problem: Problem, dims: tuple[int, ...], batch: int, device: torch.device) -> Launch:
        key = (problem.name, dims, batch, device)
        if key not in self._launches:
            if torch.cuda.get_device_capability(device) != CAPABILITY:
                raise LaunchError(f"{torch.cuda.get_device_name(device)} is not a Hopper GPU")
            if len(self._launches) >= MAX_LAUNCHES:
                self._launches.clear()
            self._launches[key] = plan_launch(self._library, problem, batch)
        return self._launches[key]

    def _sized(self, problem: Problem, launch: Launch) -> ctypes.Structure:
        """Arguments of the largest batch of one launch, so that scratch memory is allocated once."""
        args = problem.arguments(launch.max_batch)
        args.launch = self._library.header.structs["fl_launch"](launch.cluster, launch.num_clusters, launch.stages, 1)
        return args


def _fill(args: ctypes.Structure, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        setattr(args, name, None if tensor is None else tensor.data_ptr())


@contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Launch on this device, without the cost of switching where it is the current one."""
    if device.index == torch.cuda.current_device():
        yield
    else:
        with torch.cuda.device(device):
            yield
