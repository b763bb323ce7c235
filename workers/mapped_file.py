"""Files mapped into memory: tensors that are read where they lie, by every process of the machine together."""

from __future__ import annotations

import math
import mmap
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

# Linux 5.14 and later: map what is read, and read what is not in memory yet.
MADV_POPULATE_READ = 22
POPULATE_BYTES = 32 * 2**20


class MappedFile:
    """A file in memory, read-only. It must not be cut short while it is mapped: touching what is gone ends a process.

    Its tensors keep the mapping alive, not this object.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """The tensor that begins at a byte, or None if its elements are not aligned there. Never write to it."""
        size = math.prod(shape) * dtype.itemsize
        if offset % dtype.itemsize:
            return None
        return self._bytes[offset : offset + size].view(dtype).view(shape)

    def populate(self, start: int, end: int) -> Iterator[int]:
        """Bring bytes ``[start, end)`` into memory, piece by piece; yields the size of each."""
        for at in range(start, end, POPULATE_BYTES):
            size = min(POPULATE_BYTES, end - at)
            first = at // mmap.PAGESIZE * mmap.PAGESIZE
            try:
                self._map.madvise(MADV_POPULATE_READ, first, at + size - first)
            except OSError:  # an older kernel: touch every page
                self._bytes[first : at + size : mmap.PAGESIZE].sum()
            yield size
