"""Linear layers on the CPU, over weights as the checkpoint has them, or quantised."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from ..errors import KernelArgumentError
from ..packed import PackedWeight
from ..quantized import QuantizedWeight
from ..stacked import StackedWeight
from ..types import Weight

Tensor = torch.Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
QUANTIZED = {8: 3, 4: 4}


class LinearWeight(ctypes.Structure):
    """``fuseline::LinearWeight`` of ``linear.h``. Whoever makes one keeps the tensors it points to."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("group", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


def describe_weight(weight: Weight, bias: Tensor | None = None) -> LinearWeight:
    """A weight for the native code.

    Args:
        weight: in one piece: float32, bfloat16 or float16 [rows, cols], whose rows may lie apart, elements of a row
            may not; or quantised, whose ``order`` names columns that there are.
        bias: float32[rows], contiguous.

    Raises:
        KernelArgumentError: it is none of this.
    """
    if isinstance(weight, StackedWeight):
        raise KernelArgumentError(f"a weight of {len(weight.parts)} parts where there is room for one")
    if isinstance(weight, PackedWeight):
        raise KernelArgumentError("a weight in the order of the GPU's kernels")
    described = _quantized(weight) if isinstance(weight, QuantizedWeight) else _float(weight)
    if bias is not None:
        rows = described.rows
        if bias.shape != (rows,) or bias.dtype != torch.float32 or not bias.is_contiguous():
            raise KernelArgumentError(f"bias must be float32[{rows}], got {tuple(bias.shape)} {bias.dtype}")
        if bias.device.type != "cpu":
            raise KernelArgumentError(f"bias must be on the CPU, not on {bias.device}")
        described.bias = bias.data_ptr()
    return described


def _quantized(weight: QuantizedWeight) -> LinearWeight:
    if weight.device.type != "cpu":
        raise KernelArgumentError(f"a weight must be on the CPU, not on {weight.device}")
    if weight.order is not None and not 0 <= int(weight.order.min()) <= int(weight.order.max()) < weight.cols:
        raise KernelArgumentError(f"order names columns that a weight of {weight.cols} does not have")
    return LinearWeight(
        data=weight.data.data_ptr(),
        rows=weight.rows,
        cols=weight.cols,
        scales=weight.scales.data_ptr(),
        zeros=None if weight.zeros is None else weight.zeros.data_ptr(),
        order=None if weight.order is None else weight.order.data_ptr(),
        group=weight.group,
        dtype=QUANTIZED[weight.bits],
    )


def _float(weight: Tensor) -> LinearWeight:
    if weight.dim() != 2 or weight.dtype not in DTYPES or weight.device.type != "cpu":
        raise KernelArgumentError(
            f"a weight is a float matrix on the CPU, got {tuple(weight.shape)} {weight.dtype} on {weight.device}"
        )
    rows, cols = weight.shape
    stride = weight.stride(0)
    if (cols > 1 and weight.stride(1) != 1) or (rows > 1 and stride < cols) or cols == 0:
        raise KernelArgumentError(f"rows of a weight must be contiguous, got {tuple(weight.shape)} {weight.stride()}")
    return LinearWeight(
        data=weight.data_ptr(),
        rows=rows,
        cols=cols,
        row_stride=stride if rows > 1 else cols,
        dtype=DTYPES[weight.dtype],
    )


def linear(
    library: ctypes.CDLL,
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """``x @ weight.T + bias`` of every weight, side by side.

    Args:
        x: float32 [m, cols]; rows may lie apart.
        weights, biases: as for ``describe_weight``; the weights have one dtype and ``cols``.

    Returns:
        float32 [m, rows of all weights].

    Raises:
        KernelArgumentError: an argument does not fit.
    """
    biases = [None] * len(weights) if biases is None else biases
    if not weights or len(biases) != len(weights):
        raise KernelArgumentError(f"{len(weights)} weights with {len(biases)} biases")
    parts = (LinearWeight * len(weights))(*map(describe_weight, weights, biases))
    first = parts[0]
    if any((part.dtype, part.cols, part.order) != (first.dtype, first.cols, first.order) for part in parts):
        raise KernelArgumentError("weights that share an input have one dtype, one number and one order of columns")
    if x.dim() != 2 or x.dtype != torch.float32 or x.device.type != "cpu" or x.shape[1] != first.cols:
        raise KernelArgumentError(
            f"x must be float32 [m, {first.cols}], got {tuple(x.shape)} {x.dtype} on {x.device}"
        )
    if x.shape[1] > 1 and x.stride(1) != 1:
        raise KernelArgumentError(f"rows of x must be contiguous, got strides {x.stride()}")
    y = torch.empty(x.shape[0], sum(part.rows for part in parts))
    if y.numel() == 0:
        return y
    packed_bytes = library.fl_cpu_linear_packed_bytes
    packed_bytes.restype = ctypes.c_int64
    packed = torch.empty(packed_bytes(ctypes.byref(first), ctypes.c_int64(x.shape[0])), dtype=torch.uint8)
    library.fl_cpu_linear(
        parts,
        ctypes.c_int(len(parts)),
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_int64(x.stride(0)),
        ctypes.c_int64(x.shape[0]),
        ctypes.c_void_p(y.data_ptr()),
        ctypes.c_int64(y.stride(0)),
        ctypes.c_void_p(packed.data_ptr()),
    )
    return y
