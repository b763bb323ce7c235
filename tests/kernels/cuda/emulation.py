"""Runs the CUDA kernels of kernels/csrc/cuda on the CPU, under the emulator beside them.

The kernels' sources are compiled by g++ with the instrumentation of -fsanitize=thread, whose callbacks the emulator
defines; see kernels/csrc/cuda/emulator.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import fuseline
from fuseline.kernels.build import LibrarySource, build_library, find_compiler

Array = NDArray[Any]
CUDA = Path(fuseline.__file__).parent / "kernels" / "csrc" / "cuda"
EMULATOR = CUDA / "emulator"
COMMON_FLAGS = ("-std=c++17", "-g1", "-fPIC", "-Wall", "-Wextra", "-DFUSELINE_EMULATE")
KERNEL_FLAGS = (*COMMON_FLAGS, "-O1", "-Wno-unknown-pragmas", "-fsanitize=thread", "-x", "c++")


class Broken(Exception):
    """A kernel broke a rule; the message says which and where."""


def compiler() -> str:
    if shutil.which("g++") is None:
        pytest.skip("no g++: the kernels cannot be emulated")
    return find_compiler("g++")


@cache
def load_emulator() -> ctypes.CDLL:
    """The emulator itself; its symbols are there for the libraries of kernels loaded after it."""
    headers = (*sorted(EMULATOR.glob("*.h")), CUDA / "launch.h", CUDA / "ptx.cuh")
    source = LibrarySource(
        "emulator", tuple(sorted(EMULATOR.glob("*.cpp"))), headers, (*COMMON_FLAGS, "-O2"), ("-shared", "-ldl")
    )
    library = ctypes.CDLL(str(build_library(source, compiler())), mode=ctypes.RTLD_GLOBAL)
    library.fl_emu_reset.argtypes = [ctypes.c_uint64, ctypes.c_uint32]
    library.fl_emu_buffer.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int, ctypes.c_int]
    library.fl_emu_run.argtypes = [ctypes.c_char_p, ctypes.c_uint64]
    library.fl_emu_steps.restype = ctypes.c_uint64
    return library


@cache
def build_kernels(name: str, *sources: Path, folder: Path = CUDA) -> Path:
    """A library of kernels for the emulator, whose headers are those in ``folder``."""
    load_emulator()
    headers = tuple(sorted(path for pattern in ("*.h", "*.cuh") for path in folder.rglob(pattern)))
    # Undefined symbols are the emulator's; the sanitizer's library stays out, so no -fsanitize here.
    return build_library(LibrarySource(name, sources, headers, (*KERNEL_FLAGS, f"-I{folder}")), compiler())


class Emulation:
    """One run: name the buffers, call entry points of a library of kernels, then ``run``.

    Args:
        seed: draws the order of threads and copies.
        max_resident: CTAs that fit at once; 0 for any number.
    """

    def __init__(self, library: Path, seed: int, max_resident: int = 0) -> None:
        self._library = library
        self._emulator = load_emulator()
        self._emulator.fl_emu_reset(seed, max_resident)
        self._kept: list[Array] = []

    def buffer(self, name: str, array: Array, *, writable: bool = False, written: bool = True) -> int:
        """Let kernels use an array; its address. Reading what is not ``written`` is an error until a kernel does."""
        self._kept.append(array)
        self.memory(name, array.ctypes.data, array.nbytes, writable=writable, written=written)
        return int(array.ctypes.data)

    def memory(self, name: str, address: int, num_bytes: int, *, writable: bool, written: bool = True) -> None:
        """Likewise, memory that somebody else keeps until the end of the run."""
        self._emulator.fl_emu_buffer(name.encode(), address, num_bytes, writable, written)

    def output(self, name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> tuple[Array, int]:
        """An array to be written, and its address."""
        array = aligned(shape, dtype)
        array.view(np.uint8)[...] = 0xFF
        return array, self.buffer(name, array, writable=True, written=False)

    def input(self, name: str, values: Array) -> int:
        """The address of an aligned, read-only copy."""
        array = aligned(values.shape, values.dtype)
        array[...] = values
        return self.buffer(name, array)

    def run(self) -> None:
        """Run what was launched.

        Raises:
            Broken: a kernel broke a rule.
        """
        message = ctypes.create_string_buffer(4096)
        if self._emulator.fl_emu_run(message, len(message)):
            raise Broken(self._with_lines(message.value.decode(errors="replace")))

    def _with_lines(self, message: str) -> str:
        places = re.findall(r"at (0x[0-9a-f]+)", message)
        tool = shutil.which("addr2line")
        if not places or tool is None:
            return message
        # A return address: one back is in the call.
        addresses = [hex(int(place, 16) - 1) for place in places]
        command = [tool, "-s", "-i", "-e", str(self._library), *addresses]
        lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")
        return f"{message}\n  lines: {' '.join(filter(None, lines))}"


def aligned(shape: tuple[int, ...], dtype: Any) -> Array:
    """Uninitialised, aligned to 256 bytes as CUDA's allocations are."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + 256, np.uint8)
    start = -memory.ctypes.data % 256
    array: Array = memory[start : start + size].view(dtype).reshape(shape)
    return array


def to_bf16(values: Array) -> Array:
    """Bit patterns, rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: Array) -> Array:
    """As float32."""
    values: Array = (bits.astype(np.uint32) << 16).view(np.float32)
    return values
