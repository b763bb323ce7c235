"""What kernels raise on purpose."""

from __future__ import annotations


class KernelArgumentError(ValueError):
    """An argument's shape, dtype, device or range does not fit the op; raised before anything is computed."""


class BuildError(RuntimeError):
    """Native kernels cannot be built; the message holds the compiler's."""


class CompilerNotFoundError(BuildError):
    """There is no compiler to build native kernels with."""


class LaunchError(RuntimeError):
    """A kernel could not be launched: no driver, no such device, or a fault before it."""
