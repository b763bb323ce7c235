"""The torch twin of quantised weights: rounding to them, taking them apart, and the linear layer over them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..quantized import ACTIVATION_BLOCK, DEFAULT_ZERO, PANEL_ROWS, QuantizedWeight, num_groups, padded_cols

Tensor = torch.Tensor
_SMALLEST_SCALE = float(torch.finfo(torch.float16).smallest_normal)
_TINY = 1e-30


def round_to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of float [rows, cols] to int8 and a float32 scale [rows]: ``weight ~ scale[:, None] * q``."""
    weight = weight.float()
    scales, inverse = _scales(weight.abs().amax(1))
    return (weight * inverse[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales


def round_to_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round groups of adjacent columns of float [rows, cols] to 0..15, float16 scales and zeros [rows, groups].

    A group's range always holds zero, so that a zero stays one.
    """
    rows, cols = weight.shape
    groups = num_groups(cols, group)
    grouped = F.pad(weight.float(), (0, groups * group - cols)).view(rows, groups, group)
    low, high = grouped.amin(2).clamp_(max=0), grouped.amax(2).clamp_(min=0)
    scales = ((high - low) / 15).clamp_(min=_SMALLEST_SCALE).half()
    zeros = (-low / scales.float()).round_().clamp_(0, 15)
    q = (grouped / scales.float()[:, :, None]).round_().add_(zeros[:, :, None]).clamp_(0, 15)
    return q.view(rows, -1)[:, :cols].to(torch.uint8), scales, zeros.to(torch.uint8)


def pack_int8(q: Tensor, scales: Tensor, out: QuantizedWeight) -> None:
    """Fill ``out`` with int8 [rows, cols] and float32 [rows]."""
    panels = out.data.shape[0]
    out.scales.copy_(_pad_rows(scales[:, None], panels)[:, 0])
    wide = F.pad(q, (0, padded_cols(8, out.cols) - out.cols))
    _interleave(_pad_rows(wide, panels), out.data)


def pack_int4(q: Tensor, scales: Tensor, zeros: Tensor | None, out: QuantizedWeight) -> None:
    """Fill ``out`` with uint8 [rows, cols] below 16, float16 and uint8 [rows, groups]; zeros None means 8."""
    panels = out.data.shape[0]
    out.scales.copy_(_by_panel(_pad_rows(scales, panels)))
    if out.zeros is not None and zeros is not None:
        out.zeros.copy_(_by_panel(_pad_rows(zeros, panels)))
    wide = F.pad(q, (0, padded_cols(4, out.cols) - out.cols))
    halves = _pad_rows(wide, panels).view(panels * PANEL_ROWS, -1, 2, 4)
    _interleave((halves[:, :, 0] | halves[:, :, 1] << 4).view(panels * PANEL_ROWS, -1), out.data)


def unpack(weight: QuantizedWeight) -> Tensor:
    """The integers [rows, cols]: int8, or uint8 below 16."""
    panels, steps = weight.data.shape[:2]
    rows = weight.data.view(torch.int32).squeeze(-1).transpose(1, 2).reshape(panels * PANEL_ROWS, steps).contiguous()
    data = rows.view(weight.data.dtype)
    if weight.bits == 4:
        data = torch.stack((data.view(-1, steps, 4) & 15, data.view(-1, steps, 4) >> 4), 2).view(data.shape[0], -1)
    return data[: weight.rows, : weight.cols]


def dequantize(weight: QuantizedWeight) -> Tensor:
    """The matrix that the integers stand for, float32 [rows, cols], columns in their stored order."""
    q = unpack(weight).float()
    if weight.bits == 8:
        return q * weight.scales[: weight.rows, None]
    scales = weight.scales.float().transpose(1, 2).reshape(-1, weight.scales.shape[1])[: weight.rows]
    zeros: Tensor = torch.full_like(scales, DEFAULT_ZERO)
    if weight.zeros is not None:
        zeros = weight.zeros.float().transpose(1, 2).reshape(-1, weight.zeros.shape[1])[: weight.rows]
    group = torch.arange(weight.cols, device=weight.device) // weight.group
    return (q - zeros[:, group]) * scales[:, group]


def round_activations(x: Tensor, block: int) -> Tensor:
    """``x`` [..., cols] rounded, for each row and ``block`` columns, to multiples of ``max|x| / 127``; float32."""
    cols = x.shape[-1]
    blocks = F.pad(x.float(), (0, -cols % block)).view(*x.shape[:-1], -1, block)
    scales, inverse = _scales(blocks.abs().amax(-1, keepdim=True))
    rounded: Tensor = (blocks * inverse).round_() * scales
    return rounded.flatten(-2)[..., :cols]


def linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """See ``ops.linear``. The products are of floats here, so sums may differ in the last bits from integer ones."""
    if weight.order is not None:
        x = x[..., weight.order]
    rounded = round_activations(x, weight.cols if weight.bits == 8 else ACTIVATION_BLOCK)
    return F.linear(rounded, dequantize(weight), None if bias is None else bias.float())


def _scales(largest: Tensor) -> tuple[Tensor, Tensor]:
    """Of int8 and its inverse; zero for values so small that the inverse might overflow."""
    scales = torch.where(largest < _TINY, 0.0, largest / 127)
    return scales, torch.where(scales == 0, 0.0, 1 / scales)


def _pad_rows(x: Tensor, panels: int) -> Tensor:
    return F.pad(x, (0, 0, 0, panels * PANEL_ROWS - x.shape[0])).contiguous()


def _by_panel(x: Tensor) -> Tensor:
    """[panels * 16, groups] as [panels, groups, 16]."""
    return x.view(-1, PANEL_ROWS, x.shape[1]).transpose(1, 2)


def _interleave(rows: Tensor, out: Tensor) -> None:
    """Bytes [panels * 16, n] into [panels, n / 4, 16, 4]: a transposition of four bytes at a time."""
    words = rows.view(torch.int32).view(out.shape[0], PANEL_ROWS, -1)
    out.view(torch.int32).squeeze(-1).copy_(words.transpose(1, 2))
