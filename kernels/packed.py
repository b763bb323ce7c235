"""Weights in the order in which the kernels' tensor-core instructions take them.

``mma.m16n8k16`` multiplies 16 rows by 16 columns of a weight; lane ``4 * g + t`` of the warp holds eight of those 256
elements in four registers. A packed weight stores the eight of every lane side by side, lane after lane, so that a
warp reads a fragment with one 16-byte load a lane without bank conflicts, and any run of columns of 16 rows is one
stretch of memory for a bulk copy:

    packed[unit, k, 4 * g + t] = rows 16 * unit + (g, g, g + 8, g + 8, g, g, g + 8, g + 8) at
                                 columns 16 * k + 2 * t + (0, 1, 0, 1, 8, 9, 8, 9)

Rows come in groups. Of a group, a unit holds eight rows of its lower half (as rows 0 to 7 above) and the same eight
of its upper half: a lane then has gate and up of an element when the group is all of gate and up, and a head's two
dimensions that are rotated together when it is a head. A group of 16 rows is a plain unit.

Nothing is lost or rounded: packing permutes elements (and adds rows of zeros up to a multiple of 16).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .errors import KernelArgumentError

Tensor = torch.Tensor
UNIT_ROWS = 16
STEP_COLS = 16


def pack(weight: Tensor, group_rows: int = UNIT_ROWS) -> Tensor:
    """[rows, cols] of a two-byte type as [ceil(rows / 16), cols / 16, 32, 8], contiguous.

    Raises:
        KernelArgumentError: the columns are no multiple of 16, or the rows no whole number of larger groups.
    """
    rows, cols = weight.shape
    if cols % STEP_COLS:
        raise KernelArgumentError(f"a weight of {cols} columns cannot be packed; they must be a multiple of 16")
    if group_rows % UNIT_ROWS or (group_rows > UNIT_ROWS and rows % group_rows):
        raise KernelArgumentError(f"{rows} rows cannot be packed in groups of {group_rows}")
    pairs = F.pad(weight, (0, 0, 0, -rows % UNIT_ROWS)).view(torch.int32)  # of columns, which stay together
    # group, half, unit, g, k, column half, t
    parts = pairs.view(-1, 2, group_rows // UNIT_ROWS, 8, cols // STEP_COLS, 2, 4)
    packed = parts.permute(0, 2, 4, 3, 6, 5, 1).reshape(-1, cols // STEP_COLS, 32, 4)
    return packed.view(weight.dtype)


def unpack(packed: Tensor, num_rows: int, group_rows: int = UNIT_ROWS) -> Tensor:
    """The first ``num_rows`` rows of the weight that was packed, in memory of their own."""
    units, steps = packed.shape[:2]
    # group, unit, k, g, t, column half, half
    parts = packed.view(torch.int32).view(-1, group_rows // UNIT_ROWS, steps, 8, 4, 2, 2)
    rows = parts.permute(0, 6, 1, 3, 2, 5, 4).reshape(units * UNIT_ROWS, steps * STEP_COLS // 2)
    return rows.view(packed.dtype)[:num_rows]


@dataclass(frozen=True, eq=False, slots=True)
class PackedWeight:
    """A matrix [rows, cols] of a linear layer that exists in the packed order only.

    Attributes:
        data: as ``pack`` makes it.
        num_rows: without the zeros behind them.
        group_rows: as ``pack`` took it.
    """

    data: Tensor
    num_rows: int
    group_rows: int

    @classmethod
    def of(cls, weight: Tensor, group_rows: int = UNIT_ROWS, *, keep: bool = False) -> PackedWeight:
        """Pack a weight, in its own memory where that is large enough: nobody may use ``weight`` any more.

        Args:
            keep: leave ``weight`` as it is, for others who use it.
        """
        packed = pack(weight, group_rows)
        if not keep and packed.numel() == weight.numel():
            packed = weight.view(packed.shape).copy_(packed)
        return cls(packed, weight.shape[0], group_rows)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        return self.num_rows, self.data.shape[1] * STEP_COLS

    @property
    def dtype(self) -> torch.dtype:
        """Of the elements."""
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.data.device

    def unpack(self) -> Tensor:
        """The matrix in rows, for one use: it takes as much memory again."""
        return unpack(self.data, self.num_rows, self.group_rows)
