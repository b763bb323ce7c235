"""The GPU kernels as nvcc builds them here; every test that needs them is skipped, visibly, where nvcc is not."""

from __future__ import annotations

import pytest

from fuseline.kernels.build import build_library, find_compiler
from fuseline.kernels.cuda.disassembly import Kernel, find_cuobjdump, read_kernels
from fuseline.kernels.cuda.library import JOBS, CudaLibrary, library_source
from fuseline.kernels.errors import CompilerNotFoundError


@pytest.fixture(scope="session")
def cuda_library() -> CudaLibrary:
    """Compiled for sm_90a and loaded, without any driver."""
    try:
        nvcc = find_compiler("nvcc", "/usr/local/cuda/bin/nvcc")
    except CompilerNotFoundError as error:
        pytest.skip(f"GPU kernels are not compiled: {error}")
    return CudaLibrary(build_library(library_source(), nvcc, JOBS))


@pytest.fixture(scope="session")
def compiled_kernels(cuda_library: CudaLibrary) -> list[Kernel]:
    """What cuobjdump says of them."""
    try:
        find_cuobjdump()
    except CompilerNotFoundError as error:
        pytest.skip(f"compiled kernels are not looked at: {error}")
    return read_kernels(cuda_library.path)
