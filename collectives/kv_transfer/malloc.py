"""One setting of glibc's allocator, for processes that receive megabytes per message."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEEP_BYTES = 64 << 20
_HEAP_BYTES = 32 << 20  # glibc allows no more


def keep_message_memory() -> None:
    """Let the allocator keep up to 64 MiB of freed memory per arena for the next message; does nothing off glibc.

    By default a freed message's pages go back to the kernel, and the next message faults them in again, zeroed, one
    by one: measured at a quarter of the time that receiving 2 MiB gRPC messages takes.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _HEAP_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)
