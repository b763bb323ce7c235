"""Rounding float weights to nearest on the CPU, as ``reference.quantized`` does, to the bit."""

from __future__ import annotations

import ctypes

import torch

from ..errors import KernelArgumentError
from ..quantized import QuantizedWeight
from .linear import describe_weight


def round_weight(library: ctypes.CDLL, weight: torch.Tensor, out: QuantizedWeight) -> None:
    """Fill ``out``, int8 or int4 with zero points, with a float matrix of its shape.

    Raises:
        KernelArgumentError: they do not fit.
    """
    if tuple(weight.shape) != out.shape or (out.bits == 4 and out.zeros is None):
        raise KernelArgumentError(f"cannot round {tuple(weight.shape)} to int{out.bits} {out.shape} without zeros")
    source, target = describe_weight(weight), describe_weight(out)
    scratch_bytes = library.fl_cpu_round_scratch_bytes
    scratch_bytes.restype = ctypes.c_int64
    num_bytes = scratch_bytes(ctypes.byref(source)) * library.fl_cpu_team_size()
    scratch = torch.empty(num_bytes + 64, dtype=torch.uint8)
    library.fl_cpu_round(ctypes.byref(source), ctypes.byref(target), ctypes.c_void_p(scratch.data_ptr()))
