"""The fused head: arguments checked, then launched."""

from __future__ import annotations

import ctypes

import torch

from ..checks import describe
from ..errors import KernelArgumentError
from .arguments import MAX_BATCH, check_optional, check_packed, check_tensor
from .launch import Problem
from .launcher import Launcher, set_pointers
from .library import CudaLibrary

Tensor = torch.Tensor


def check_head(
    residual: Tensor,
    delta: Tensor | None,
    norm: Tensor,
    weight: Tensor,
    vocab: int,
    rows: Tensor,
    num_candidates: int,
) -> None:
    """Refuse arguments that do not fit one another or the kernel.

    Raises:
        KernelArgumentError: naming what was expected and what came.
    """
    if residual.dim() != 2:
        raise KernelArgumentError(f"residual must be [T, H], got {describe(residual)}")
    shape, device = (residual.shape[0], residual.shape[1]), residual.device
    check_tensor("residual", residual, shape, torch.float32, device)
    check_optional("delta", delta, shape, torch.float32, device)
    check_tensor("norm", norm, (shape[1],), torch.bfloat16, device)
    if vocab < 1 or not 0 <= num_candidates <= vocab:
        raise KernelArgumentError(f"{num_candidates} candidates of {vocab} rows are not possible")
    check_packed("weight", weight, -(-vocab // 16) * 16, shape[1], device)
    if rows.dim() != 1 or not 1 <= rows.shape[0] <= MAX_BATCH:
        raise KernelArgumentError(f"rows must be int64[1 to {MAX_BATCH}], got {describe(rows)}")
    check_tensor("rows", rows, (rows.shape[0],), torch.int64, device)


def head_problem(library: CudaLibrary, hidden: int, vocab: int, num_candidates: int, eps: float) -> Problem:
    """The head of these sizes."""

    def arguments(batch: int) -> ctypes.Structure:
        return library.arguments(
            "fl_head_args", batch=batch, hidden=hidden, vocab=vocab, num_candidates=num_candidates, eps=eps
        )

    dims = (hidden, vocab, num_candidates)
    return Problem("head", "fl_cuda_head", dims, ((-(-vocab // 16) * 16, hidden),), arguments)


def head_logits(
    launcher: Launcher,
    residual: Tensor,
    delta: Tensor | None,
    norm: Tensor,
    weight: Tensor,
    vocab: int,
    rows: Tensor,
    eps: float,
) -> Tensor:
    """float32[S, vocab], the logits of rows ``rows`` int64[S], S at most ``MAX_BATCH``.

    Args:
        residual, delta: float32[T, H].
        norm: bfloat16[H].
        weight: packed [vocab, H], with rows of zeros up to a multiple of 16.

    Raises:
        KernelArgumentError: the arguments do not fit.
        LaunchError: the device cannot run the kernel.
    """
    check_head(residual, delta, norm, weight, vocab, rows, 0)
    logits = residual.new_empty(rows.shape[0], vocab)
    problem = head_problem(launcher.library, residual.shape[1], vocab, 0, eps)
    for part, args in launcher.launch(problem, rows.shape[0], residual.device):
        set_pointers(
            args, residual=residual, delta=delta, rows=rows[part], norm=norm, weight=weight, logits=logits[part]
        )
    return logits


def head_candidates(
    launcher: Launcher,
    residual: Tensor,
    delta: Tensor | None,
    norm: Tensor,
    weight: Tensor,
    vocab: int,
    rows: Tensor,
    num_candidates: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The best logits float32[S, num_candidates] and their rows int32, best first, without all the others.

    Of equal logits the lower row comes first. Arguments and errors are those of ``head_logits``.
    """
    if num_candidates < 1:
        raise KernelArgumentError(f"at least one candidate must be asked for, not {num_candidates}")
    check_head(residual, delta, norm, weight, vocab, rows, num_candidates)
    shape = (rows.shape[0], num_candidates)
    best, found = residual.new_empty(shape), torch.empty(shape, dtype=torch.int32, device=residual.device)
    problem = head_problem(launcher.library, residual.shape[1], vocab, num_candidates, eps)
    for part, args in launcher.launch(problem, rows.shape[0], residual.device):
        set_pointers(
            args,
            residual=residual,
            delta=delta,
            rows=rows[part],
            norm=norm,
            weight=weight,
            candidate_logits=best[part],
            candidate_rows=found[part],
        )
    return best, found
