"""What is checked before a GPU kernel gets a pointer.

All raise KernelArgumentError, naming what was expected and what came.
"""

from __future__ import annotations

import torch

from ..checks import describe
from ..errors import KernelArgumentError

Tensor = torch.Tensor
BULK_ALIGNMENT = 16  # of bulk copies and 16-byte loads
# Tokens of a call, cut into launches of 64: three read the weights as often as unpacking them for cuBLAS would.
MAX_BATCH = 3 * 64


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Of exactly this shape, dtype and device, contiguous, and where a bulk copy can read it."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device:
        raise KernelArgumentError(f"{name} must be {shape} {dtype} on {device}, got {describe(tensor)}")
    if not tensor.is_contiguous():
        raise KernelArgumentError(f"{name} must be contiguous, got strides {tensor.stride()} for {describe(tensor)}")
    if tensor.device.type != "meta" and tensor.data_ptr() % BULK_ALIGNMENT:
        raise KernelArgumentError(f"{name} must start at a multiple of {BULK_ALIGNMENT} bytes: {describe(tensor)}")


def check_optional(
    name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """None, or as ``check_tensor``."""
    if tensor is not None:
        check_tensor(name, tensor, shape, dtype, device)


def check_packed(name: str, packed: Tensor, rows: int, cols: int, device: torch.device) -> None:
    """A bfloat16 weight [rows, cols] in the order of ``kernels.packed.pack``."""
    if rows % 16 or cols % 32:
        raise KernelArgumentError(f"{name}: [{rows}, {cols}] must be multiples of 16 rows and 32 columns")
    check_tensor(name, packed, (rows // 16, cols // 16, 32, 8), torch.bfloat16, device)


def check_batch(residual: Tensor, delta: Tensor | None, max_batch: int) -> tuple[int, int]:
    """A float32 residual and delta of at most so many tokens; returns tokens and hidden size."""
    if residual.dim() != 2 or not 1 <= residual.shape[0] <= max_batch:
        raise KernelArgumentError(f"residual must be [1 to {max_batch}, H], got {describe(residual)}")
    shape = (residual.shape[0], residual.shape[1])
    check_tensor("residual", residual, shape, torch.float32, residual.device)
    check_optional("delta", delta, shape, torch.float32, residual.device)
    return shape


def check_block_tables(block_tables: Tensor, context_lens: Tensor, block_size: int, num_blocks: int) -> None:
    """Every context fits its table and every block it uses exists. Waits for the device: for finding faults only."""
    tables, lens = block_tables.cpu(), context_lens.cpu()
    room = tables.shape[1] * block_size
    if int(lens.min()) < 0 or int(lens.max()) > room:
        raise KernelArgumentError(f"context_lens {lens.tolist()} must be 0 to {room}, which the block tables hold")
    for row, context in enumerate(lens.tolist()):
        used = tables[row, : -(-context // block_size)]
        if used.numel() and (int(used.min()) < 0 or int(used.max()) >= num_blocks):
            raise KernelArgumentError(f"row {row} uses blocks {used.tolist()}, of which {num_blocks} exist")
