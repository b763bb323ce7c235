"""The native library of GPU kernels: built by nvcc at first use, or carried along ready-made.

``FUSELINE_CUDA_LIBRARY`` names a library built elsewhere (same sources, or its entry points refuse the calls); else
nvcc builds one into the kernel cache. Loading needs no driver: launching without one returns an error.
"""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache
from pathlib import Path
from typing import Any

from ..build import LibrarySource, build_library, find_compiler
from ..errors import BuildError, LaunchError
from .header import SOURCE_FOLDER, Header, read_headers

logger = logging.getLogger(__name__)

# 90a: wgmma and the other instructions of Hopper alone need the "a".
ARCHITECTURE = "-gencode=arch=compute_90a,code=sm_90a"
FLAGS = (
    "-O3",
    "-std=c++17",
    ARCHITECTURE,
    "-Xcompiler",
    "-fPIC,-Wall,-Wextra",
    "--expt-relaxed-constexpr",
)
LINK_FLAGS = ("-shared", "-cudart", "static", ARCHITECTURE)
JOBS = 4


class CudaLibrary:
    """The entry points of one shared library, as ``api.h`` states them.

    Attributes:
        path: of the shared library.
        header: what ``api.h`` states.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = api_header()
        try:
            self._library = ctypes.CDLL(str(path))
            for name, function in self.header.functions.items():
                entry = getattr(self._library, name)
                entry.restype, entry.argtypes = function.result, list(function.arguments)
        except (OSError, AttributeError) as error:
            raise BuildError(f"{path} cannot be loaded: {error}") from error

    def arguments(self, struct: str, **fields: Any) -> ctypes.Structure:
        """An argument struct with its version and these fields set, the others zero."""
        return self.header.structs[struct](version=self.header.constants["FL_CUDA_API"], **fields)

    def call(self, name: str, *arguments: Any) -> int:
        """What an entry point returns that measures something."""
        result: int = getattr(self._library, name)(*arguments)
        return result

    def launch(self, name: str, *arguments: Any) -> None:
        """Call an entry point that returns a cudaError_t.

        Raises:
            LaunchError: it is not 0; nothing was launched.
        """
        error = self.call(name, *arguments)
        if error:
            raise LaunchError(f"{name} failed: {self.error_name(error)} ({error})")

    def error_name(self, error: int) -> str:
        """The name of a cudaError_t."""
        name: bytes = self._library.fl_cuda_error_name(error)
        return name.decode()


@cache
def api_header() -> Header:
    """The C ABI, read once."""
    return read_headers(SOURCE_FOLDER / "api.h")


def library_source() -> LibrarySource:
    """What the library is built from."""
    return LibrarySource(
        name="fuseline_cuda_sm90a",
        sources=tuple(sorted(SOURCE_FOLDER.glob("*.cu"))),
        headers=tuple(sorted((*SOURCE_FOLDER.glob("*.cuh"), *SOURCE_FOLDER.glob("*.h")))),
        flags=FLAGS,
        link_flags=LINK_FLAGS,
    )


@cache
def load_library() -> CudaLibrary:
    """The library of this process, built if need be.

    Raises:
        BuildError: it cannot be built or loaded; CompilerNotFoundError if there is no nvcc.
    """
    carried = os.environ.get("FUSELINE_CUDA_LIBRARY")
    if carried:
        return CudaLibrary(Path(carried))
    nvcc = find_compiler(os.environ.get("NVCC", ""), "nvcc", "/usr/local/cuda/bin/nvcc")
    return CudaLibrary(build_library(library_source(), nvcc, JOBS))


@cache
def native_library() -> CudaLibrary | None:
    """The library of this process, or None if there is none; then the reason has been logged, once."""
    try:
        return load_library()
    except BuildError as error:
        logger.warning("GPU kernels are not available, torch computes instead, which is slower. %s", error)
        return None
