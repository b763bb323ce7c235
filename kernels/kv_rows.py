"""How a token's key or value of one head lies in the KV cache: a row, the last dimension of every cache.

In a float dtype a row is its D elements. In int8 it is D integers from -127 to 127, followed by the four bytes of a
float32 scale: ``x = scale * q``, ``scale = max|x| / 127``, q rounded to the nearest, ties to even. The scale lies in
the row so that whoever moves KV moves bytes and need not know. A row with an element that is not finite has a scale
of NaN, so it is NaN as a whole; a row of zeros has a scale of zero.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor
SCALE_BYTES = 4
LARGEST = 127


def row_width(head_dim: int, dtype: torch.dtype) -> int:
    """Elements of a row in a cache of ``dtype``."""
    return head_dim + SCALE_BYTES if dtype == torch.int8 else head_dim


def row_head_dim(cache: Tensor) -> int:
    """Elements of a head, D, by the rows of a cache."""
    return cache.shape[-1] - SCALE_BYTES if cache.dtype == torch.int8 else cache.shape[-1]


def quantize_rows(x: Tensor) -> Tensor:
    """Rows int8[..., D + 4] of floats [..., D]."""
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    scale = torch.where(largest.isfinite(), largest / LARGEST, torch.nan)
    # Compared so that a scale of NaN, too, leaves zeros: they are not to depend on what cannot be told.
    rounded = torch.where(scale > 0, x / scale, 0.0).round().clamp(-LARGEST, LARGEST)
    return torch.cat((rounded.to(torch.int8), scale.view(torch.int8)), -1)


def dequantize_rows(rows: Tensor, out: Tensor | None = None) -> Tensor:
    """Floats [..., D] of rows int8[..., D + 4].

    Args:
        out: where to write them, in any float dtype: all of those hold the integers exactly. None for new float32.
    """
    head_dim = row_head_dim(rows)
    scale = rows[..., head_dim:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    integers = rows[..., :head_dim]
    return (integers.float() if out is None else out.copy_(integers)).mul_(scale)
