"""Launchers of the shared-memory exchange between ranks; the contract is in ``csrc/exchange/exchange.h``.

A library of its own, since ranks exchange whatever computes their layers; it compiles in seconds.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shlex
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from .build import LibrarySource, build_library, find_compiler
from .cpu.library import FLAGS, LINK_FLAGS
from .cpu.threads import usable_cores
from .errors import BuildError, KernelArgumentError

logger = logging.getLogger(__name__)

SOURCE_FOLDER = Path(__file__).parent / "csrc"
# Longer than ranks of equal speed drift apart in a layer; sleeping and waking up takes about as long.
SPIN_NS = 50_000
MAX_RANKS = 16
_REASONS = {
    1: "this rank has left",
    2: "rank {peer} has left",
    3: "the process of rank {peer} is gone",
    4: "rank {peer} did not come in time",
    5: "arguments were refused",
}
_DTYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.int32: 4,
    torch.int64: 5,
}
REDUCIBLE = frozenset(_DTYPES)
"""The dtypes that ``Exchange.all_reduce`` adds."""


class ExchangeError(RuntimeError):
    """A peer is gone or late; the exchange is closed. ``code`` is what the native function returned."""

    def __init__(self, code: int) -> None:
        super().__init__(_REASONS.get(code & 0xFF, f"failure {code}").format(peer=code >> 8))


@dataclass(frozen=True, slots=True)
class NativeAllReduce:
    """An all-reduce for native code to call: ``int32_t function(void* handle, float* data, int64_t n)``.

    Attributes:
        function, handle: addresses; ``owner`` must be kept alive while they may be called.
    """

    function: int
    handle: int
    owner: object


@cache
def exchange_library() -> ctypes.CDLL | None:
    """The library, built if need be, or None if there can be none; then the reason has been logged, once.

    ``FUSELINE_CPU_FLAGS`` adds flags of the compiler, as it does for the library of CPU kernels.
    """
    extra_flags = shlex.split(os.environ.get("FUSELINE_CPU_FLAGS", ""))
    source = LibrarySource(
        name=f"fuseline_exchange_{platform.machine()}",
        sources=(SOURCE_FOLDER / "exchange" / "exchange.cpp",),
        headers=(SOURCE_FOLDER / "exchange" / "exchange.h", SOURCE_FOLDER / "cpu" / "isa.h"),
        flags=(*FLAGS, *extra_flags),
        link_flags=(*LINK_FLAGS, *extra_flags),
    )
    try:
        path = build_library(source, find_compiler(os.environ.get("CXX", ""), "g++", "c++"))
        library = ctypes.CDLL(str(path))
    except (BuildError, OSError) as error:
        logger.warning("ranks cannot exchange through shared memory, which is slower. %s", error)
        return None
    _declare(library)
    return library


class Exchange:
    """One rank's handle on a mapping that all ranks of a group share.

    One thread calls at a time, but ``close`` may come from any. Tensors are contiguous and on the CPU. Each call
    raises ExchangeError when a peer is gone or late, which closes this handle.

    Args:
        segment: ``num_bytes`` of zeroed memory, mapped by every rank.
        pids: the ranks' processes, one entry per rank.
        timeout_s: for a peer to come.

    Raises:
        KernelArgumentError: the segment's size does not fit the ranks, or the rank is none of them.
        OSError: a process cannot be watched.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        segment: npt.NDArray[np.uint8],
        rank: int,
        pids: Sequence[int],
        timeout_s: float,
    ) -> None:
        world = len(pids)
        if not 2 <= world <= MAX_RANKS or not 0 <= rank < world or len(segment) != num_bytes(library, world):
            raise KernelArgumentError(f"rank {rank} of {world} cannot share {len(segment)} bytes")
        self._library = library
        self.rank = rank
        self.world_size = world
        pidfds = _watch(pids)
        # Spinning with more ranks than cores keeps from running those that are waited for.
        spin_ns = SPIN_NS if world <= usable_cores() else 0
        handle = library.fl_shm_create(
            segment.ctypes.data, rank, world, (ctypes.c_int32 * world)(*pidfds), spin_ns, int(timeout_s * 1e9)
        )
        if not handle:
            _close_all(pidfds)
            raise KernelArgumentError(f"rank {rank} of {world} cannot share this segment")
        self._handle: int = handle
        # The mapping stays as long as the handle. Not at exit, when a thread may be in a call.
        weakref.finalize(self, _destroy, library, handle, pidfds, segment).atexit = False

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Add the ranks' tensors in rank order, in place; the dtype is one of ``REDUCIBLE``."""
        if tensor.dtype not in REDUCIBLE:
            raise KernelArgumentError(f"cannot add {tensor.dtype}")
        code = _DTYPES[tensor.dtype]
        _check(self._library.fl_shm_reduce(self._handle, _address(tensor), tensor.numel(), code))

    def all_gather(self, tensor: torch.Tensor, out: torch.Tensor) -> None:
        """Write the ranks' tensors, of any dtype, to ``out[world_size, ...]``."""
        if out.nbytes != self.world_size * tensor.nbytes:
            raise KernelArgumentError(f"{out.nbytes} bytes for {self.world_size} tensors of {tensor.nbytes}")
        _check(self._library.fl_shm_all_gather(self._handle, _address(tensor), _address(out), tensor.nbytes))

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        """Overwrite the tensor with that of rank ``src``."""
        _check(self._library.fl_shm_broadcast(self._handle, _address(tensor), tensor.nbytes, src))

    def send(self, tensor: torch.Tensor, dst: int) -> None:
        """Hand the tensor to rank ``dst``; returns when it is in the mapping, but for the last pieces unread."""
        _check(self._library.fl_shm_send(self._handle, _address(tensor), tensor.nbytes, dst))

    def recv(self, tensor: torch.Tensor, src: int) -> None:
        """Overwrite the tensor with what rank ``src`` sends."""
        _check(self._library.fl_shm_recv(self._handle, _address(tensor), tensor.nbytes, src))

    def barrier(self) -> None:
        """Return when every rank has called."""
        _check(self._library.fl_shm_barrier(self._handle))

    def native_all_reduce(self) -> NativeAllReduce:
        """``all_reduce`` of float32 for native code; a non-zero result closes this and is an ``ExchangeError``'s."""
        function = ctypes.cast(self._library.fl_shm_all_reduce, ctypes.c_void_p).value
        return NativeAllReduce(function or 0, self._handle, self)

    def close(self) -> None:
        """Leave: calls under way and those of ranks that wait for this one fail. Idempotent."""
        self._library.fl_shm_close(self._handle)


def num_bytes(library: ctypes.CDLL, world_size: int) -> int:
    """Of the segment that so many ranks share, from 2 to ``MAX_RANKS``."""
    return int(library.fl_shm_bytes(world_size))


def _declare(library: ctypes.CDLL) -> None:
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    for name, result, arguments in (
        ("bytes", i64, (i32,)),
        ("create", pointer, (pointer, i32, i32, ctypes.POINTER(i32), i64, i64)),
        ("close", None, (pointer,)),
        ("destroy", None, (pointer,)),
        ("reduce", i32, (pointer, pointer, i64, i32)),
        ("all_gather", i32, (pointer, pointer, pointer, i64)),
        ("broadcast", i32, (pointer, pointer, i64, i32)),
        ("barrier", i32, (pointer,)),
        ("send", i32, (pointer, pointer, i64, i32)),
        ("recv", i32, (pointer, pointer, i64, i32)),
    ):
        function = getattr(library, f"fl_shm_{name}")
        function.restype, function.argtypes = result, arguments


def _check(code: int) -> None:
    if code & 0xFF == 5:
        raise KernelArgumentError(_REASONS[5])
    if code:
        raise ExchangeError(code)


def _address(tensor: torch.Tensor) -> int:
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise KernelArgumentError(
            f"a {tensor.device} tensor with strides {tensor.stride()}: not contiguous on the CPU"
        )
    return tensor.data_ptr()


def _watch(pids: Sequence[int]) -> list[int]:
    """A pidfd for each process but this one, which needs no watching: -1."""
    pidfds: list[int] = []
    try:
        for pid in pids:
            pidfds.append(-1 if pid == os.getpid() else os.pidfd_open(pid))
    except OSError:
        _close_all(pidfds)
        raise
    return pidfds


def _close_all(pidfds: Sequence[int]) -> None:
    for pidfd in pidfds:
        if pidfd >= 0:
            os.close(pidfd)


def _destroy(library: ctypes.CDLL, handle: int, pidfds: list[int], _segment: object) -> None:
    library.fl_shm_destroy(handle)
    _close_all(pidfds)
