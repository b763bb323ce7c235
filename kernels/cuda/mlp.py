"""The fused MLP block: arguments checked, then launched."""

from __future__ import annotations

import ctypes

import torch

from .arguments import MAX_BATCH, check_batch, check_optional, check_packed, check_tensor
from .launch import Problem
from .launcher import Launcher, of_rows, set_pointers
from .library import CudaLibrary

Tensor = torch.Tensor


def check_mlp(
    residual: Tensor,
    delta: Tensor | None,
    norm: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
) -> None:
    """Refuse arguments that do not fit one another or the kernel.

    Raises:
        KernelArgumentError: naming what was expected and what came.
    """
    _, hidden = check_batch(residual, delta, MAX_BATCH)
    inner, device = down.shape[1] * 16 if down.dim() == 4 else 0, residual.device
    check_tensor("norm", norm, (hidden,), torch.bfloat16, device)
    check_packed("down", down, hidden, inner, device)
    check_packed("gate_up", gate_up, 2 * inner, hidden, device)
    check_optional("gate_up_bias", gate_up_bias, (2 * inner,), torch.bfloat16, device)
    check_optional("down_bias", down_bias, (hidden,), torch.bfloat16, device)


def mlp_problem(library: CudaLibrary, hidden: int, inner: int, eps: float) -> Problem:
    """The block of these sizes."""

    def arguments(batch: int) -> ctypes.Structure:
        return library.arguments("fl_mlp_args", batch=batch, hidden=hidden, inner=inner, eps=eps)

    phases = ((2 * inner, hidden), (hidden, inner))
    return Problem("mlp", "fl_cuda_mlp_block", (hidden, inner), phases, arguments)


def mlp_block(
    launcher: Launcher,
    residual: Tensor,
    delta: Tensor | None,
    norm: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of ``residual + delta``, gate and up, SwiGLU, down; returns as ``ops.mlp_block`` does.

    Args:
        residual, delta: float32[T, H], T at most ``MAX_BATCH``.
        gate_up: packed [2 * I, H], gate and up interleaved.
        down: packed [H, I].
        norm, gate_up_bias, down_bias: bfloat16, as in ``MlpWeights``.

    Raises:
        KernelArgumentError: the arguments do not fit.
        LaunchError: the device cannot run the kernel.
    """
    check_mlp(residual, delta, norm, gate_up, gate_up_bias, down, down_bias)
    problem = mlp_problem(launcher.library, residual.shape[1], down.shape[1] * 16, eps)
    total, out = torch.empty_like(residual), torch.empty_like(residual)
    for rows, args in launcher.launch(problem, residual.shape[0], residual.device):
        set_pointers(
            args,
            residual=residual[rows],
            delta=of_rows(delta, rows),
            norm=norm,
            gate_up=gate_up,
            gate_up_bias=gate_up_bias,
            down=down,
            down_bias=down_bias,
            residual_out=total[rows],
            delta_out=out[rows],
        )
    return total, out
