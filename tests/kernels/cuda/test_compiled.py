"""Every kernel as nvcc compiles it: registers within its budget, nothing spilled, the instructions it stands on."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from fuseline.kernels.cuda.disassembly import Kernel
from fuseline.kernels.cuda.header import SOURCE_FOLDER, Header, read_headers
from fuseline.kernels.cuda.layout import RESERVED_SHARED_BYTES
from fuseline.kernels.cuda.library import CudaLibrary, library_source, load_library
from fuseline.kernels.errors import BuildError, LaunchError

pytestmark = pytest.mark.timeout(900)  # compiling all kernels takes a minute of a core


@dataclass(frozen=True)
class Expected:
    """What a kernel may use and must contain.

    Attributes:
        budget: <budget>_MAX_REGISTERS in the *_tiles.h, or WIDE_MAX_REGISTERS for instances of many tokens.
        fences: the most GPU-scope fences: one for each grid barrier, arrival or release through global memory.
        generic: the most loads and stores of unknown address space; those of a peer's memory count as such.
    """

    budget: str
    needed: tuple[str, ...]
    fences: int
    generic: int = 0


STREAMING = ("UBLKCP", "SYNCS", "HMMA.16816", "LDSM", "STAS", "UCGABAR_ARV", "UCGABAR_WAIT", "ACQBULK", "PREEXIT")
EXPECTED = {
    "mlp_block": Expected("MLP", STREAMING, 1),
    "attention_block": Expected("ATTN", (*STREAMING, "MOVM"), 3),
    "head": Expected("HEAD", STREAMING, 1),
    "reduce_on_chip": Expected("COLLECTIVE", ("STAS", "SYNCS"), 0),
    "gather_on_chip": Expected("COLLECTIVE", ("STAS", "SYNCS"), 0),
    "reduce_off_chip": Expected("COLLECTIVE", (), 2),
    "gather_off_chip": Expected("COLLECTIVE", (), 2),
    "dsmem": Expected("COLLECTIVE", ("UBLKCP",), 4, generic=64),
}


@pytest.fixture(scope="module")
def tiles() -> Header:
    return read_headers(*sorted(SOURCE_FOLDER.glob("*_tiles.h")))


def expected(kernel: Kernel) -> Expected:
    return EXPECTED[kernel.name.partition("<")[0]]


def test_every_kernel_keeps_its_budget(compiled_kernels: list[Kernel], tiles: Header) -> None:
    assert {kernel.name.partition("<")[0] for kernel in compiled_kernels} == EXPECTED.keys()
    for kernel in compiled_kernels:
        column_tiles = re.search(r"(\d+)>$", kernel.name)
        is_wide = column_tiles is not None and int(column_tiles[1]) >= tiles.constants["WIDE_TILES"]
        prefix = expected(kernel).budget
        budget = tiles.constants[f"{prefix}_MAX_REGISTERS"]
        if is_wide:
            budget = tiles.constants.get(f"{prefix}_WIDE_MAX_REGISTERS", tiles.constants["WIDE_MAX_REGISTERS"])
        assert kernel.registers <= budget, f"{kernel.name} has {kernel.registers} registers"
        assert kernel.stack_bytes == 0, f"{kernel.name} spills"
        assert kernel.shared_bytes <= RESERVED_SHARED_BYTES, f"{kernel.name}: shared memory nobody counts"


def test_every_kernel_has_the_instructions_it_stands_on(compiled_kernels: list[Kernel]) -> None:
    for kernel in compiled_kernels:
        for needle in expected(kernel).needed:
            assert kernel.count(needle), f"{kernel.name} has no {needle}"


def test_no_kernel_fences_the_whole_gpu_or_loses_an_address_space(compiled_kernels: list[Kernel]) -> None:
    for kernel in compiled_kernels:
        fences = kernel.count("MEMBAR.GPU", "MEMBAR.SYS")
        assert fences <= expected(kernel).fences, f"{kernel.name}: {fences} fences"
        assert kernel.count("LD", "ST") <= expected(kernel).generic, f"{kernel.name} has generic loads or stores"


def test_the_library_refuses_an_old_caller(cuda_library: CudaLibrary) -> None:
    args = cuda_library.arguments("fl_mlp_args")
    args.version += 1
    with pytest.raises(LaunchError, match="InvalidValue"):
        cuda_library.launch("fl_cuda_mlp_block", args)


def test_a_library_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "other.so"
    path.write_bytes(b"not a library")
    monkeypatch.setenv("FUSELINE_CUDA_LIBRARY", str(path))
    load_library.cache_clear()
    try:
        with pytest.raises(BuildError, match="cannot be loaded"):
            load_library()
    finally:
        load_library.cache_clear()


def test_sources_and_headers_are_all_named() -> None:
    source = library_source()
    assert {path.suffix for path in source.sources} == {".cu"}
    assert {path.suffix for path in source.headers} == {".cuh", ".h"}
