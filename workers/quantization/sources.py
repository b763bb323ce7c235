"""Quantised linear layers as checkpoints hold them: their tensors, and integers, scales and zeros of a slice.

Formats, for a layer of ``out`` by ``in`` channels; eight 4-bit values share an int32, the first in the lowest bits:
    gptq: qweight int32 [in / 8, out]; qzeros int32 [groups, out / 8], in version 1 one less than the zero point;
        scales [groups, out]; g_idx int32 [in], each input channel's group.
    awq: qweight int32 [in, out / 8], qzeros int32 [groups, out / 8], both with the eight output channels in the order
        0 2 4 6 1 3 5 7; scales [groups, out].
    compressed-tensors, 4 bits: weight_packed int32 [out, in / 8] and weight_zero_point int32 [out / 8, groups], both
        plus 8; weight_scale [out, groups]; weight_g_idx int32 [in] with act-order; weight_shape.
    compressed-tensors, 8 bits: weight int8 [out, in]; weight_scale [out, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...kernels.quantized import DEFAULT_ZERO, num_groups
from ...runtime.errors import ModelFormatError
from ..checkpoint import FLOATS, Checkpoint
from .config import AWQ, GPTQ, ROUNDED, WHOLE_ROW, LinearFormat

Tensor = torch.Tensor
INT32, INT8 = ("I32",), ("I8",)
_AWQ_NIBBLE_OF_CHANNEL = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True, slots=True)
class Module:
    """A linear layer of a checkpoint, whole."""

    name: str
    rows: int
    cols: int


@dataclass(frozen=True, eq=False, slots=True)
class Unpacked:
    """A slice of a layer.

    Attributes:
        q: int8 or uint8 [rows, cols].
        scales: float32 [rows] for int8, float16 [rows, groups] for int4.
        zeros: uint8 [rows, groups]; None for int8, and for int4 around 8.
    """

    q: Tensor
    scales: Tensor
    zeros: Tensor | None = None


def stored_tensors(form: LinearFormat, module: Module) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Shapes and allowed dtypes, as safetensors names them, of the tensors that hold a layer, by their full names."""
    rows, cols = module.rows, module.cols
    groups = 1 if form.group == WHOLE_ROW else num_groups(cols, form.group)
    if form.method == ROUNDED:
        tensors: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {"weight": ((rows, cols), FLOATS)}
    elif form.method == GPTQ:
        tensors = {
            "qweight": ((cols // 8, rows), INT32),
            "qzeros": ((groups, rows // 8), INT32),
            "scales": ((groups, rows), FLOATS),
            "g_idx": ((cols,), INT32),
        }
    elif form.method == AWQ:
        tensors = {
            "qweight": ((cols, rows // 8), INT32),
            "qzeros": ((groups, rows // 8), INT32),
            "scales": ((groups, rows), FLOATS),
        }
    elif form.bits == 8:
        tensors = {"weight": ((rows, cols), INT8), "weight_scale": ((rows, 1), FLOATS)}
    else:
        tensors = {
            "weight_packed": ((rows, -(-cols // 8)), INT32),
            "weight_scale": ((rows, groups), FLOATS),
            "weight_shape": ((2,), ("I64", "I32")),
        }
        if form.zeros:
            tensors["weight_zero_point"] = (-(-rows // 8), groups), INT32
        if form.act_order:
            tensors["weight_g_idx"] = (cols,), INT32
    return {f"{module.name}.{name}": entry for name, entry in tensors.items()}


def check_stored(checkpoint: Checkpoint, form: LinearFormat, module: Module) -> int:
    """Refuse a layer whose tensors are missing or misshapen; reads headers only.

    Returns:
        The bytes that the layer takes in the checkpoint.

    Raises:
        ModelFormatError: naming the tensor.
    """
    if form.method in (GPTQ, AWQ) and (module.rows % 8 or module.cols % 8):
        raise ModelFormatError(
            f"{module.name} has {module.rows} x {module.cols} channels, which {form.method} cannot pack by eight",
            tensor=module.name,
        )
    total = 0
    for name, (shape, dtypes) in stored_tensors(form, module).items():
        total += checkpoint.check_tensor(name, shape, dtypes).num_bytes
    return total


def read_order(checkpoint: Checkpoint, form: LinearFormat, module: Module) -> Tensor | None:
    """Which input channel each column of the unpacked weight belongs to, int32 [cols]; None for their own order.

    Raises:
        ModelFormatError: ``g_idx`` makes groups of another size than the format's, or reorders where it must not.
    """
    if form.method == GPTQ:
        name = f"{module.name}.g_idx"
    elif form.act_order:
        name = f"{module.name}.weight_g_idx"
    else:
        return None
    g_idx = checkpoint.read_range(name, (module.cols,), INT32, (0, module.cols))
    group = module.cols if form.group == WHOLE_ROW else form.group
    in_order = torch.arange(module.cols, dtype=torch.int32) // group
    if not form.act_order:
        if not torch.equal(g_idx, in_order):
            raise _unusable(checkpoint, name, "is not in order, though the configuration says so")
        return None
    order = torch.argsort(g_idx, stable=True)
    if not torch.equal(g_idx[order], in_order):
        raise _unusable(checkpoint, name, f"does not make groups of {group} channels")
    return order.to(torch.int32)


def read_slice(
    checkpoint: Checkpoint,
    form: LinearFormat,
    module: Module,
    rows: tuple[int, int],
    cols: tuple[int, int],
    order: Tensor | None,
) -> Unpacked:
    """Read output channels ``rows`` and input channels ``cols`` of a quantised layer, and nothing else.

    Args:
        cols: from a group's start to a group's end; with ``order`` all of them.
        order: of ``read_order``; the result's columns are in it.

    Raises:
        ModelFormatError: a value cannot be used.
    """
    reader = _Reader(checkpoint, form, module, rows, cols)
    if form.bits == 8:
        return reader.int8()
    if form.method == GPTQ:
        unpacked = reader.gptq()
    elif form.method == AWQ:
        unpacked = reader.awq()
    else:
        unpacked = reader.compressed_tensors()
    if order is None:
        return unpacked
    return Unpacked(unpacked.q.index_select(1, order), unpacked.scales, unpacked.zeros)


class _Reader:
    """Reads one slice of one layer."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        form: LinearFormat,
        module: Module,
        rows: tuple[int, int],
        cols: tuple[int, int],
    ) -> None:
        self._checkpoint, self._form, self._module = checkpoint, form, module
        self._stored = stored_tensors(form, module)
        self._rows, self._cols = rows, cols
        self._groups = (0, 1)
        if form.group != WHOLE_ROW:
            self._groups = cols[0] // form.group, num_groups(cols[1], form.group)

    def read(self, name: str, first: tuple[int, int], second: tuple[int, int]) -> Tensor:
        full = f"{self._module.name}.{name}"
        return self._checkpoint.read_range(full, *self._stored[full], first, second)

    def int8(self) -> Unpacked:
        scales = self.read("weight_scale", self._rows, (0, 1))[:, 0].float()
        return self._checked(Unpacked(self.read("weight", self._rows, self._cols), scales), "weight_scale")

    def gptq(self) -> Unpacked:
        rows, cols = self._rows, self._cols
        packed = _nibbles(self.read("qweight", _eighths(cols), rows))  # [in / 8, out, 8]
        q = _trim(packed.transpose(1, 2).flatten(0, 1), cols).T
        scales = self.read("scales", self._groups, rows).half().T
        return self._checked(Unpacked(q, scales, self._zeros(None)), "scales")

    def awq(self) -> Unpacked:
        rows, cols = self._rows, self._cols
        channels = _nibbles(self.read("qweight", cols, _eighths(rows)))[:, :, _AWQ_NIBBLE_OF_CHANNEL].flatten(1)
        scales = self.read("scales", self._groups, rows).half().T
        unpacked = Unpacked(_trim(channels.T, rows), scales, self._zeros(_AWQ_NIBBLE_OF_CHANNEL))
        return self._checked(unpacked, "scales")

    def compressed_tensors(self) -> Unpacked:
        rows, cols = self._rows, self._cols
        q = _trim(_nibbles(self.read("weight_packed", rows, _eighths(cols))).flatten(1).T, cols).T
        zeros = None
        if self._form.zeros:
            packed = _nibbles(self.read("weight_zero_point", _eighths(rows), self._groups))  # [out / 8, groups, 8]
            zeros = _trim(packed.transpose(1, 2).flatten(0, 1), rows)
        scales = self.read("weight_scale", rows, self._groups).half()
        return self._checked(Unpacked(q, scales, zeros), "weight_scale")

    def _zeros(self, nibble_of_channel: tuple[int, ...] | None) -> Tensor | None:
        """Zero points [rows, groups] of qzeros; None when all are the default, as the format then promises."""
        packed = _nibbles(self.read("qzeros", self._groups, _eighths(self._rows)))
        if nibble_of_channel is not None:
            packed = packed[:, :, nibble_of_channel]
        zeros = _trim(packed.flatten(1).T, self._rows) + self._form.zero_offset
        if self._form.zeros:
            return zeros
        if not (zeros == DEFAULT_ZERO).all():
            raise _unusable(
                self._checkpoint,
                f"{self._module.name}.qzeros",
                f"has zero points other than {DEFAULT_ZERO}, though the configuration says that there are none",
            )
        return None

    def _checked(self, unpacked: Unpacked, name: str) -> Unpacked:
        if not torch.isfinite(unpacked.scales).all():
            raise _unusable(
                self._checkpoint,
                f"{self._module.name}.{name}",
                f"has values that {unpacked.scales.dtype} cannot hold",
            )
        return unpacked


def _nibbles(packed: Tensor) -> Tensor:
    """int32 [a, b] as uint8 [a, b, 8], lowest bits first."""
    pairs = packed.contiguous().view(torch.uint8).view(*packed.shape, 4)
    return torch.stack((pairs & 15, pairs >> 4), 3).flatten(2)


def _eighths(span: tuple[int, int]) -> tuple[int, int]:
    return span[0] // 8, -(-span[1] // 8)


def _trim(values: Tensor, span: tuple[int, int]) -> Tensor:
    """The rows ``span`` of rows that start at the multiple of eight before it."""
    return values[span[0] % 8 : span[0] % 8 + span[1] - span[0]]


def _unusable(checkpoint: Checkpoint, name: str, why: str) -> ModelFormatError:
    file = checkpoint.tensors[name].file
    return ModelFormatError(f"{file}: tensor {name} {why}", file=file, tensor=name)
