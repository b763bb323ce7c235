"""Reading cuobjdump's output."""

import pytest

from fuseline.kernels.cuda.disassembly import Kernel, parse_code, parse_usage, readable

SASS = """
\t\tFunction : _ZN8fuseline9mlp_blockILi4EEEv11fl_mlp_args
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                        /* 0x00 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;     /* 0x00 */
        /*0020*/                   LDS.128 R4, [R2] ;                            /* 0x00 */
        /*0030*/             @!UP0 MEMBAR.ALL.GPU ;                              /* 0x00 */
        /*0040*/                   LD.E R4, desc[UR4][R2.64] ;                   /* 0x00 */
\t\tFunction : plain
        /*0000*/                   EXIT ;                                        /* 0x00 */
"""


def test_instructions_are_counted_by_function() -> None:
    code = parse_code(SASS)
    assert code["plain"] == {"EXIT": 1}
    kernel = Kernel("mlp_block", 80, 0, 0, code["_ZN8fuseline9mlp_blockILi4EEEv11fl_mlp_args"])
    assert kernel.opcodes.total() == 5
    assert kernel.count("MEMBAR.GPU") == kernel.count("MEMBAR.ALL.GPU") == 1
    assert kernel.count("LD") == 1
    assert kernel.count("LDG.128") == 1
    assert kernel.count("LDG", "LDS") == 2
    assert kernel.count("LDL") == 0


def test_resources_are_read() -> None:
    text = " Function _Zab:\n  REG:80 STACK:56 SHARED:1024 LOCAL:8 CONSTANT[0]:672 TEXTURE:0\n"
    assert parse_usage(text) == {"_Zab": (80, 64, 1024)}


@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        ("_ZN8fuseline38_GLOBAL__N__ceae7af9_6_mlp_cu_76ad33fb9mlp_blockILi8EEEv11fl_mlp_args", "mlp_block<8>"),
        ("_ZN8fuseline4headILi2ELb1EEEv4Args", "head<2,1>"),
        ("_Z4headv", "head"),
        ("_ZN8fuseline4head6kernelE4Args", "kernel"),
        ("plain", "plain"),
    ],
)
def test_names_are_readable(mangled: str, name: str) -> None:
    assert readable(mangled) == name
