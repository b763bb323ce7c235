"""What the compiler made of the kernels: registers, stack, and instructions, read by cuobjdump.

cuobjdump comes with the CUDA toolkit, or as the PyPI package nvidia-cuda-cuobjdump (with nvidia-cuda-nvdisasm).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..errors import BuildError, CompilerNotFoundError

TIMEOUT_S = 300.0
_USAGE = re.compile(r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_FUNCTION = re.compile(r"Function : (\S+)")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One compiled kernel.

    Attributes:
        name: without namespaces; ``mlp_block<4>`` for a template's instance.
        registers: of a thread.
        stack_bytes: of a thread, where spilled registers and arrays with run-time indices live.
        shared_bytes: static ones.
        opcodes: how often each instruction stands in the code, modifiers included, as in ``LDG.E.128``.
    """

    name: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    opcodes: Counter[str]

    def count(self, *needles: str) -> int:
        """Instructions whose modifiers contain those of a needle in this order, ``LD`` not being ``LDG``."""
        patterns = [
            re.compile(r"(\..+)?\.".join(map(re.escape, needle.split("."))) + r"(\.|$)") for needle in needles
        ]
        return sum(
            number for opcode, number in self.opcodes.items() if any(pattern.match(opcode) for pattern in patterns)
        )


def find_cuobjdump() -> str:
    """Where cuobjdump is.

    Raises:
        CompilerNotFoundError: nowhere.
    """
    packages = Path(sysconfig.get_paths()["purelib"])
    places = ("nvidia/cu13/bin/cuobjdump", "triton/backends/nvidia/bin/cuobjdump")
    for candidate in ("cuobjdump", "/usr/local/cuda/bin/cuobjdump", *(str(packages / place) for place in places)):
        if path := shutil.which(candidate):
            return path
    raise CompilerNotFoundError(
        "no cuobjdump: install the PyPI packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm"
    )


def read_kernels(library: Path) -> list[Kernel]:
    """All kernels of a library; instances of a template over types have the same name.

    Raises:
        CompilerNotFoundError: there is no cuobjdump.
        BuildError: it cannot read the library.
    """
    tool = find_cuobjdump()
    usage = parse_usage(_run(tool, "--dump-resource-usage", str(library)))
    code = parse_code(_run(tool, "--dump-sass", str(library)))
    return [
        Kernel(readable(mangled), *numbers, opcodes=code.get(mangled, Counter()))
        for mangled, numbers in usage.items()
    ]


def parse_usage(text: str) -> dict[str, tuple[int, int, int]]:
    """Registers, stack and local bytes, and static shared bytes of each function of ``--dump-resource-usage``."""
    return {
        name: (int(registers), int(stack) + int(local), int(shared))
        for name, registers, stack, shared, local in _USAGE.findall(text)
    }


def parse_code(text: str) -> dict[str, Counter[str]]:
    """Instructions of each function of ``--dump-sass``."""
    parts = _FUNCTION.split(text)
    return {name: Counter(_INSTRUCTION.findall(body)) for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def readable(mangled: str) -> str:
    """The last part of a mangled name and its integer template arguments."""
    if not mangled.startswith("_Z"):
        return mangled
    rest = mangled[2:].removeprefix("N")
    name = mangled
    while match := re.match(r"(\d+)", rest):
        length = int(match[1])
        start = len(match[1])
        name, rest = rest[start : start + length], rest[start + length :]
    if not rest.startswith("I"):
        return name
    arguments = re.match(r"I((?:L[a-z]\d+E)+)E", rest)
    values = re.findall(r"\d+", arguments[1]) if arguments else []
    return f"{name}<{','.join(values)}>" if values else name


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} took more than {TIMEOUT_S:.0f} s") from error
    if done.returncode:
        raise BuildError(f"{command[0]} failed:\n{done.stderr[:2000]}")
    return done.stdout
