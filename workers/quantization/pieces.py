"""A rank's quantised weights while they are loaded: layers of the checkpoint, stacked and cut, become one weight.

Only a few panels of rows are held unpacked at a time, so loading needs little memory beside the weights themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ...kernels.cpu.library import native_library
from ...kernels.cpu.rounding import round_weight
from ...kernels.quantized import ACTIVATION_BLOCK, PANEL_ROWS, QuantizedWeight, tensor_layout
from ...kernels.reference.quantized import pack_int4, pack_int8, round_to_int4, round_to_int8
from ...runtime.errors import ModelFormatError
from ..checkpoint import FLOATS, Checkpoint
from .config import ROUNDED, WHOLE_ROW, LinearFormat
from .sources import Module, Unpacked, check_stored, read_order, read_slice, stored_tensors

Tensor = torch.Tensor
Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]

# Elements that are unpacked at once; float32 copies of them are made on the way.
CHUNK_ELEMENTS = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Part:
    """Output channels ``[start, end)`` of a layer."""

    module: Module
    start: int
    end: int


@dataclass(frozen=True, eq=False, slots=True)
class QuantizedPiece:
    """What fills one weight.

    Attributes:
        parts: one under the other, all with the same input channels.
        cols: input channels ``[start, end)`` of each.
        out: to be filled.
    """

    form: LinearFormat
    parts: tuple[Part, ...]
    cols: tuple[int, int]
    out: QuantizedWeight

    def names(self) -> set[str]:
        """The checkpoint's tensors that belong to it."""
        return {name for part in self.parts for name in stored_tensors(self.form, part.module)}

    def check(self, checkpoint: Checkpoint) -> int:
        """Refuse tensors that are missing or misshapen; returns about how many bytes ``fill`` will read.

        Raises:
            ModelFormatError: naming the tensor.
        """
        share = (self.cols[1] - self.cols[0]) / self.parts[0].module.cols
        return sum(
            int(check_stored(checkpoint, self.form, part.module) * share * (part.end - part.start) / part.module.rows)
            for part in self.parts
        )


def new_piece(
    form: LinearFormat, parts: tuple[Part, ...], cols: tuple[int, int], allocate: Allocate
) -> QuantizedPiece:
    """Allocate a weight and say what fills it.

    Raises:
        ModelFormatError: ``cols`` cut a group of the checkpoint's in two, or an order that only holds for the whole.
    """
    module, width = parts[0].module, cols[1] - cols[0]
    if form.method != ROUNDED and width != module.cols:
        _check_cut(form, module, cols)
    rows = sum(part.end - part.start for part in parts)
    group = 0
    if form.bits == 4:
        group = -(-width // ACTIVATION_BLOCK) * ACTIVATION_BLOCK if form.group == WHOLE_ROW else form.group
    layout = tensor_layout(form.bits, rows, width, group, zeros=form.zeros, order=form.act_order)
    tensors = {name: allocate(shape, dtype) for name, (shape, dtype) in layout.items()}
    return QuantizedPiece(form, parts, cols, QuantizedWeight(form.bits, rows, width, group, **tensors))


def fill(checkpoint: Checkpoint, piece: QuantizedPiece) -> Iterator[float]:
    """Read and pack a weight, some panels at a time; yields how much of it is done, from 0 to 1.

    Raises:
        ModelFormatError: a value cannot be used, or the parts order their inputs differently.
    """
    out = piece.out
    step = max(1, CHUNK_ELEMENTS // (out.cols * PANEL_ROWS)) * PANEL_ROWS
    if piece.form.method == ROUNDED:
        for start in range(0, out.rows, step):
            _round(checkpoint, piece, start, min(start + step, out.rows))
            yield min(start + step, out.rows) / out.rows
        return
    orders = [read_order(checkpoint, piece.form, part.module) for part in piece.parts]
    if (order := orders[0]) is not None and out.order is not None:
        for part, other in zip(piece.parts, orders, strict=True):
            if other is None or not torch.equal(order, other):
                raise ModelFormatError(
                    f"{part.module.name} orders its input channels otherwise than {piece.parts[0].module.name},"
                    " with which it shares them",
                    tensor=part.module.name,
                )
        out.order.copy_(order)
    for start in range(0, out.rows, step):
        end = min(start + step, out.rows)
        unpacked = _stack([read_slice(checkpoint, *span, order) for span in _spans(piece, start, end)])
        target = out.panels(start, end)
        if out.bits == 8:
            pack_int8(unpacked.q, unpacked.scales, target)
        else:
            pack_int4(unpacked.q, unpacked.scales, unpacked.zeros, target)
        yield end / out.rows


def _round(checkpoint: Checkpoint, piece: QuantizedPiece, start: int, end: int) -> None:
    """Fill rows ``[start, end)`` with floats rounded to nearest."""
    target, parts = piece.out.panels(start, end), []
    for _, module, rows, cols in _spans(piece, start, end):
        name, whole = f"{module.name}.weight", (module.rows, module.cols)
        parts.append(checkpoint.read_range(name, whole, FLOATS, rows, cols))
    weight = parts[0] if len(parts) == 1 else torch.cat(parts)
    if (library := native_library()) is not None:
        round_weight(library, weight, target)
    elif target.bits == 8:
        pack_int8(*round_to_int8(weight), target)
    else:
        pack_int4(*round_to_int4(weight, target.group), target)
    if not torch.isfinite(target.scales).all():
        names = " or ".join(f"{part.module.name}.weight" for part in piece.parts)
        raise ModelFormatError(f"{names} has values that are not finite", tensor=names)


def _spans(
    piece: QuantizedPiece, start: int, end: int
) -> Iterator[tuple[LinearFormat, Module, tuple[int, int], tuple[int, int]]]:
    """The slices that make up rows ``[start, end)`` of the stack."""
    above = 0
    for part in piece.parts:
        first = max(start - above, 0) + part.start
        last = min(end - above + part.start, part.end)
        if first < last:
            yield piece.form, part.module, (first, last), piece.cols
        above += part.end - part.start


def _stack(slices: list[Unpacked]) -> Unpacked:
    if len(slices) == 1:
        return slices[0]
    zeros = [piece.zeros for piece in slices if piece.zeros is not None]
    return Unpacked(
        torch.cat([piece.q for piece in slices]),
        torch.cat([piece.scales for piece in slices]),
        torch.cat(zeros) if zeros else None,
    )


def _check_cut(form: LinearFormat, module: Module, cols: tuple[int, int]) -> None:
    """Whether input channels of a quantised checkpoint can be cut at ``cols``."""
    if form.act_order:
        raise ModelFormatError(
            f"{module.name} is quantised with act-order (desc_act), so its {module.cols} input channels cannot be"
            f" divided among ranks; use tensor_parallel_size=1",
            field="tensor_parallel_size",
            value=module.cols // (cols[1] - cols[0]),
            limit=1,
        )
    unit = ACTIVATION_BLOCK if form.group == WHOLE_ROW else form.group
    for cut in cols:
        if form.bits == 4 and cut % unit and cut != module.cols:
            raise ModelFormatError(
                f"tensor parallelism would cut the {module.cols} input channels of {module.name} at {cut}, within a"
                f" group of {unit}; use a tensor_parallel_size that divides {-(-module.cols // unit)}",
                field="tensor_parallel_size",
                value=cut,
                limit=unit,
            )
