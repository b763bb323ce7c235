"""Quantised weights: what the numbers mean, and how they lie in memory. One definition for every device.

int8: symmetric, one scale per output channel; ``w = scale[row] * q``, q from -127 to 127. A linear layer quantises
its input per token, ``scale = max|x| / 127``, and multiplies integers exactly.

int4: groups of 32, 64, 128 … adjacent input channels share a scale and a zero point; ``w = scale * (q - zero)``, q
from 0 to 15, zero from 0 to 16, or always 8 when there are no zeros. A linear layer quantises its input to 8 bits per
token and ``ACTIVATION_BLOCK`` channels; the sums within a block are exact.

Memory: panels of ``PANEL_ROWS`` output channels, so that a kernel reads one stream from the first byte to the last.
    int8: [panels][cols / 4][16 rows][4 cols], cols padded with zeros to ``INT8_COLS``.
    int4: [panels][cols / 8][16 rows][4 bytes], cols padded to ``ACTIVATION_BLOCK``; of the 8 columns of a row the
          first four are low nibbles, the last four high ones. Scales and zeros: [panels][groups][16 rows].
The last panel is padded with zero scales. A last group may be shorter than the others.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from .errors import KernelArgumentError

Tensor = torch.Tensor
PANEL_ROWS = 16
INT8_COLS = 64
ACTIVATION_BLOCK = 32
DEFAULT_ZERO = 8


@dataclass(frozen=True, eq=False, slots=True)
class QuantizedWeight:
    """A matrix [rows, cols] of a linear layer, or of several stacked under each other.

    Attributes:
        bits: 8 or 4.
        group: input channels that share a scale, a multiple of 32; 0 for int8.
        data: int8 [panels, cols' / 4, 16, 4], or uint8 [panels, cols' / 8, 16, 4]; cols' is padded.
        scales: float32 [panels * 16], or float16 [panels, groups, 16].
        zeros: uint8 [panels, groups, 16]; None for int8 and for int4 around ``DEFAULT_ZERO``.
        order: int32 [cols], which input each column takes; None for their own order.
    """

    bits: int
    rows: int
    cols: int
    group: int
    data: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    order: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse tensors that do not fit; kernels trust what stands here."""
        zeros, order = self.zeros is not None, self.order is not None
        expected = tensor_layout(self.bits, self.rows, self.cols, self.group, zeros=zeros, order=order)
        for name, (shape, dtype) in expected.items():
            tensor: Tensor | None = getattr(self, name)
            if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
                found = "nothing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
                raise KernelArgumentError(f"{name} must be contiguous {shape} {dtype}, got {found}")
            if tensor.device != self.data.device:
                raise KernelArgumentError(f"{name} is on {tensor.device}, the data on {self.data.device}")

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols), without padding."""
        return self.rows, self.cols

    @property
    def device(self) -> torch.device:
        """Of all its tensors."""
        return self.data.device

    @property
    def num_bytes(self) -> int:
        """That a pass over the weight reads."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, always in the same order."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def panels(self, start: int, end: int) -> QuantizedWeight:
        """A view of rows [start, end); both multiples of ``PANEL_ROWS``, but for the end of the last row."""
        if start % PANEL_ROWS or (end % PANEL_ROWS and end != self.rows):
            raise KernelArgumentError(f"rows {start}..{end} are not whole panels of {PANEL_ROWS}")
        first, last = start // PANEL_ROWS, -(-end // PANEL_ROWS)
        rows_of_scales = PANEL_ROWS if self.bits == 8 else 1
        return replace(
            self,
            rows=end - start,
            data=self.data[first:last],
            scales=self.scales[first * rows_of_scales : last * rows_of_scales],
            zeros=None if self.zeros is None else self.zeros[first:last],
        )


def num_groups(cols: int, group: int) -> int:
    """Scales of one output channel of an int4 weight."""
    return -(-cols // group)


def padded_cols(bits: int, cols: int) -> int:
    """Columns with their padding."""
    step = INT8_COLS if bits == 8 else ACTIVATION_BLOCK
    return -(-cols // step) * step


def tensor_layout(
    bits: int, rows: int, cols: int, group: int = 0, *, zeros: bool = False, order: bool = False
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor of a weight, by the name of its field.

    Raises:
        KernelArgumentError: there is no such format.
    """
    if bits not in (4, 8) or rows < 1 or cols < 1:
        raise KernelArgumentError(f"no format for {bits} bits and {rows} x {cols}")
    if (group != 0 or zeros) if bits == 8 else (group < ACTIVATION_BLOCK or group % ACTIVATION_BLOCK):
        raise KernelArgumentError(f"int{bits} has no groups of {group} channels" + " with zeros" * zeros)
    panels, wide = -(-rows // PANEL_ROWS), padded_cols(bits, cols)
    result: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if bits == 8:
        result["data"] = (panels, wide // 4, PANEL_ROWS, 4), torch.int8
        result["scales"] = (panels * PANEL_ROWS,), torch.float32
    else:
        per_group = (panels, num_groups(cols, group), PANEL_ROWS)
        result["data"] = (panels, wide // 8, PANEL_ROWS, 4), torch.uint8
        result["scales"] = per_group, torch.float16
        if zeros:
            result["zeros"] = per_group, torch.uint8
    if order:
        result["order"] = (cols,), torch.int32
    return result
