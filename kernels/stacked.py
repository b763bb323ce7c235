"""Weights that belong one under the other but lie apart, as a mapped checkpoint has them: Q, K and V, gate and up."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import KernelArgumentError

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False, slots=True)
class StackedWeight:
    """A matrix [rows, cols] of a linear layer in parts, so that nothing has to be copied to put it together.

    Attributes:
        parts: at least one; matrices of the same columns and dtype on the same device.
    """

    parts: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        kinds = {(part.dim(), part.shape[-1:], part.dtype, part.device) for part in self.parts}
        if len(kinds) != 1 or self.parts[0].dim() != 2:
            raise KernelArgumentError(
                f"parts do not fit: {[(tuple(p.shape), p.dtype, p.device) for p in self.parts]}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(rows of all parts, cols)."""
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of every part."""
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        """Of every part."""
        return self.parts[0].device

    def split(self, bias: Tensor | None) -> list[Tensor | None]:
        """The parts' shares of a bias [rows]."""
        if bias is None:
            return [None] * len(self.parts)
        return list(torch.split(bias, [part.shape[0] for part in self.parts]))
