"""The one error that ops raise on purpose."""

from __future__ import annotations


class KernelArgumentError(ValueError):
    """An argument's shape, dtype, device or range does not fit the op; raised before anything is computed."""
