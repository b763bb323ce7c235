"""Constants, structs and functions as Python reads them off C headers."""

import ctypes
from pathlib import Path

import pytest

from fuseline.kernels.cuda.header import HeaderError, read_headers


def write(folder: Path, text: str, name: str = "a.h") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_constants_build_on_earlier_ones(tmp_path: Path) -> None:
    first = write(tmp_path, "#pragma once\n#include <cstdint>\nconstexpr int ROWS = 16; // rows\n")
    second = write(
        tmp_path,
        '#include "a.h"\nnamespace fuseline {\nconstexpr int BYTES = ROWS * (512 + 8) * 2 - 1;\n'
        "constexpr int HALF = BYTES / 2 % 7 << 3 >> 1; /* a\nb */ constexpr int LESS = -1;\n} // namespace\n",
        "b.h",
    )
    constants = read_headers(first, second).constants
    assert constants == {"ROWS": 16, "BYTES": 16639, "HALF": 8319 % 7 << 3 >> 1, "LESS": -1}


ARGS = """
#ifdef __cplusplus
extern "C" {
#endif
#define FL_API 2
typedef uint16_t fl_bf16;
constexpr int WAYS = 3;
typedef struct {
    int32_t rows; // first
    int64_t bytes;
} fl_part;
typedef struct {
    int32_t version;
    const fl_bf16* weight; // [rows]
    float eps;
    fl_part part;
    int32_t sizes[WAYS];
    void* stream;
} fl_args;
int fl_cuda_run(const fl_args* args);
int64_t fl_cuda_bytes(const fl_args* args, int32_t what);
const char* fl_cuda_name(int error);
#ifdef __cplusplus
}
#endif
"""


def test_structs_are_laid_out_as_the_compiler_does(tmp_path: Path) -> None:
    header = read_headers(write(tmp_path, ARGS))
    args = header.structs["fl_args"]
    offsets = [(field[0], getattr(args, field[0]).offset) for field in args._fields_]
    assert offsets == [("version", 0), ("weight", 8), ("eps", 16), ("part", 24), ("sizes", 40), ("stream", 56)]
    assert ctypes.sizeof(args) == 64
    assert header.constants["FL_API"] == 2
    run, measure = header.functions["fl_cuda_run"], header.functions["fl_cuda_bytes"]
    assert (run.result, run.arguments) == (ctypes.c_int, (ctypes.POINTER(args),))
    assert (measure.result, measure.arguments) == (ctypes.c_int64, (ctypes.POINTER(args), ctypes.c_int32))
    assert header.functions["fl_cuda_name"].arguments == (ctypes.c_int,)


@pytest.mark.parametrize(
    "text",
    [
        "constexpr int A = B;",
        "constexpr int A = f(1);",
        "constexpr int A = 1 +;",
        "template <int N> struct A { int32_t x; };",
        "#define A f(1)",
        "typedef struct { bool x; } A;",
        "typedef struct { int32_t x : 3; } A;",
        "typedef other mine;",
        "int fl_cuda_run(other args);",
        "int other(int x);",
    ],
)
def test_anything_else_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(HeaderError):
        read_headers(write(tmp_path, text))
