"""Quantised weights kept on disk, so that a second start maps them instead of making them again.

One file holds all quantised weights of one rank: a page that says what it is, then the weights as they lie in memory.
Processes that map the same file share its pages. A file is written under another name, with its checksum, and renamed
when it is complete; a damaged one is noticed and made again. Processes that want the same file at once wait for the
one that makes it.

The folder is ``$FUSELINE_WEIGHT_CACHE`` (empty: nothing is kept), or ``user_cache("weights")``; only its owner may
enter. It holds at most ``MAX_BYTES``: what was used longest ago goes first. It may be removed at any time.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

import torch
import xxhash

from ...kernels.build import user_cache

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MAX_BYTES = 64 * 2**30
# Left free on the disk at least.
MIN_FREE_BYTES = 2 * 2**30
HEADER_BYTES = 4096
ALIGNMENT = 64
_HASH_BYTES = 64 * 2**20


class Arena:
    """Memory that quantised weights are allocated from, one after the other.

    Attributes:
        filled: whether the weights are there already.
    """

    def __init__(self, memory: mmap.mmap, start: int, filled: bool) -> None:
        self.filled = filled
        self._memory = memory
        self._next = start

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The next piece of it; keeps the memory alive."""
        start, count = self._next, math.prod(shape)
        self._next = start + aligned(count * dtype.itemsize)
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=start).view(shape)


def aligned(num_bytes: int) -> int:
    """What a tensor of so many bytes takes of an arena."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


@contextmanager
def open_arena(key: str, num_bytes: int) -> Iterator[Arena]:
    """Memory for quantised weights, filled if the cache has them.

    Otherwise the caller fills it within the context; when that ends without an error the weights are kept for the
    next time. Trouble with the cache is logged and costs no more than its benefit.

    Args:
        key: of everything that the weights depend on, safe as a file's name.
        num_bytes: of all tensors, each ``aligned``.
    """
    folder = _usable_folder(num_bytes)
    lock = None if folder is None else _lock(folder / f"{key}.lock")
    if folder is None or lock is None:
        yield _anonymous(num_bytes)
        return
    with lock:
        path = folder / f"{key}.weights"
        arena = _map(path, key, num_bytes)
        if arena is not None:
            yield arena
            return
        with _new_file(folder, key, num_bytes) as memory:
            if memory is None:
                yield _anonymous(num_bytes)
                return
            yield Arena(memory, HEADER_BYTES, filled=False)
            _seal(memory, key, num_bytes)


def _usable_folder(num_bytes: int) -> Path | None:
    given = os.environ.get("FUSELINE_WEIGHT_CACHE")
    if given == "" or num_bytes > MAX_BYTES:
        return None
    try:
        folder = Path(given) if given else user_cache("weights")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o077:
            logger.warning("quantised weights are not cached: %s is open to others", folder)
            return None
    except OSError as error:
        logger.warning("quantised weights are not cached: %s", error)
        return None
    return folder


def _lock(path: Path) -> IO[bytes] | None:
    """A locked file, whose closing releases the lock, as does the process's end; None if it cannot be locked."""
    with ExitStack() as unless_locked:
        try:
            file = unless_locked.enter_context(path.open("wb"))
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("quantised weights are not cached: %s", error)
            return None
        unless_locked.pop_all()
        return file


def _anonymous(num_bytes: int) -> Arena:
    return Arena(mmap.mmap(-1, max(num_bytes, 1)), 0, filled=False)


def _map(path: Path, key: str, num_bytes: int) -> Arena | None:
    """The weights of a file, None if it is not there or damaged. Reads all of it, as the first step would anyway."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == HEADER_BYTES + num_bytes:
                memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                if memory[:HEADER_BYTES] == _header(key, num_bytes, _checksum(memory)):
                    os.utime(path)
                    return Arena(memory, HEADER_BYTES, filled=True)
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("%s cannot be read: %s", path, error)
        return None
    logger.warning("%s is damaged, and made again", path)
    return None


@contextmanager
def _new_file(folder: Path, key: str, num_bytes: int) -> Iterator[mmap.mmap | None]:
    """A file that becomes the cache's when the context ends without an error; None where there is no room for it."""
    memory, name = None, ""
    try:
        for left in folder.glob(f".{key}-*"):  # of a process that died; no other makes this file now
            left.unlink(missing_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{key}-", dir=folder)
        try:
            if shutil.disk_usage(folder).free >= num_bytes + MIN_FREE_BYTES:
                os.posix_fallocate(descriptor, 0, HEADER_BYTES + num_bytes)  # a full disk shows now, not on a write
                memory = mmap.mmap(descriptor, HEADER_BYTES + num_bytes)
            else:
                logger.warning("quantised weights are not cached: %s has too little room", folder)
        finally:
            os.close(descriptor)
    except OSError as error:
        logger.warning("quantised weights are not cached: %s", error)
    try:
        yield memory
        if memory is not None:
            _publish(Path(name), folder / f"{key}.weights")
    finally:
        if name:
            Path(name).unlink(missing_ok=True)


def _publish(made: Path, path: Path) -> None:
    """Give a complete file its name, and make room for it; the folder may be gone by now."""
    try:
        made.replace(path)
        with suppress(FileNotFoundError):  # another process clears away as well
            _prune(path.parent)
    except OSError as error:
        logger.warning("quantised weights are not cached: %s", error)


def _seal(memory: mmap.mmap, key: str, num_bytes: int) -> None:
    memory[:HEADER_BYTES] = _header(key, num_bytes, _checksum(memory))


def _header(key: str, num_bytes: int, checksum: str) -> bytes:
    fields = {"fuseline": "weights", "version": FORMAT_VERSION, "key": key, "bytes": num_bytes, "xxh3_128": checksum}
    return json.dumps(fields).encode().ljust(HEADER_BYTES)


def _checksum(memory: mmap.mmap) -> str:
    digest = xxhash.xxh3_128()
    with memoryview(memory) as view:
        for start in range(HEADER_BYTES, len(view), _HASH_BYTES):
            digest.update(view[start : start + _HASH_BYTES])
    return digest.hexdigest()


def _prune(folder: Path) -> None:
    """Remove the files used longest ago until the rest is within ``MAX_BYTES``. One that is mapped stays mapped."""
    by_age = sorted(folder.glob("*.weights"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for path in by_age:
        total += path.stat().st_size
        if total > MAX_BYTES:
            path.unlink(missing_ok=True)
            path.with_suffix(".lock").unlink(missing_ok=True)
