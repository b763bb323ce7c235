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


def interleave_gate_up(gate_up: Tensor) -> Tensor:
    """Rows of gate then of up [2 * n, ...], as units of eight of gate and the same eight of up.

    A lane then holds gate and up of the same element, in row ``g`` and row ``g + 8`` of its fragment.
    """
    half = gate_up.shape[0] // 2
    if half % 8:
        raise KernelArgumentError(f"{half} rows of gate cannot be interleaved with up; they must be a multiple of 8")
    return gate_up.view(2, half // 8, 8, *gate_up.shape[1:]).transpose(0, 1).reshape(gate_up.shape)


def separate_gate_up(interleaved: Tensor) -> Tensor:
    """The inverse of ``interleave_gate_up``."""
    half = interleaved.shape[0] // 2
    return interleaved.view(half // 8, 2, 8, *interleaved.shape[1:]).transpose(0, 1).reshape(interleaved.shape)
