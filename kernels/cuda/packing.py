"""Weights in the order in which the kernels' tensor-core instructions take them.

``mma.m16n8k16`` multiplies 16 rows by 16 columns of a weight; lane ``4 * g + t`` of the warp holds eight of those 256
elements in four registers. A packed weight stores the eight of every lane side by side, lane after lane, so that a
warp reads a fragment with one 16-byte load a lane without bank conflicts, and any run of columns of 16 rows is one
stretch of memory for a bulk copy:

    packed[unit, k, 4 * g + t] = rows 16 * unit + (g, g, g + 8, g + 8, g, g, g + 8, g + 8) at
                                 columns 16 * k + 2 * t + (0, 1, 0, 1, 8, 9, 8, 9)

Nothing is lost or rounded: packing permutes elements (and adds rows of zeros up to a multiple of 16).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..errors import KernelArgumentError

Tensor = torch.Tensor
UNIT_ROWS = 16
STEP_COLS = 16


def pack(weight: Tensor) -> Tensor:
    """[rows, cols] as [ceil(rows / 16), cols / 16, 32, 8], contiguous.

    Raises:
        KernelArgumentError: the columns are no multiple of 16.
    """
    rows, cols = weight.shape
    if cols % STEP_COLS:
        raise KernelArgumentError(f"a weight of {cols} columns cannot be packed; they must be a multiple of 16")
    padded = F.pad(weight, (0, 0, 0, -rows % UNIT_ROWS))
    parts = padded.view(-1, 2, 8, cols // STEP_COLS, 2, 4, 2)  # unit, row half, g, k, column half, t, pair
    return parts.permute(0, 3, 2, 5, 4, 1, 6).reshape(-1, cols // STEP_COLS, 32, 8)


def unpack(packed: Tensor, num_rows: int) -> Tensor:
    """The first ``num_rows`` rows of the weight that was packed."""
    units, steps = packed.shape[:2]
    parts = packed.view(units, steps, 8, 4, 2, 2, 2)  # unit, k, g, t, column half, row half, pair
    return parts.permute(0, 5, 2, 1, 4, 3, 6).reshape(units * UNIT_ROWS, steps * STEP_COLS)[:num_rows]


def interleave_halves(weight: Tensor, group_rows: int) -> Tensor:
    """Each group's rows as units of eight of its lower half and the same eight of its upper half.

    A lane then holds row i of the lower half and row i of the upper one, in rows ``g`` and ``g + 8`` of its fragment:
    gate and up of an element when the group is all of gate and up, or a head's two dimensions that are rotated
    together when it is a head.

    Args:
        weight: [n * group_rows, ...].

    Raises:
        KernelArgumentError: half a group is no multiple of eight rows.
    """
    if group_rows % 16 or weight.shape[0] % group_rows:
        raise KernelArgumentError(f"{weight.shape[0]} rows cannot be interleaved in groups of {group_rows}")
    parts = weight.view(-1, 2, group_rows // 16, 8, *weight.shape[1:])
    return parts.transpose(1, 2).reshape(weight.shape)


def separate_halves(interleaved: Tensor, group_rows: int) -> Tensor:
    """The inverse of ``interleave_halves``."""
    parts = interleaved.view(-1, group_rows // 16, 2, 8, *interleaved.shape[1:])
    return parts.transpose(1, 2).reshape(interleaved.shape)
