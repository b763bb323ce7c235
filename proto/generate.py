"""Regenerates the Python of the wire from its ``.proto`` sources: ``python proto/generate.py`` (or ``make proto``).

protoc emits absolute imports by proto path (``from fuseline.v1 import …``), which would need a top-level package of
that name; they are rewritten to relative ones (protobuf issue #1491).
"""

from __future__ import annotations

import re
import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parent
ABSOLUTE_IMPORT = re.compile(r"^from fuseline\.v1 import", re.MULTILINE)
ABSOLUTE_STUB_IMPORT = re.compile(r"^import fuseline\.v1\.(\w+)_pb2 as (\w+)$", re.MULTILINE)


def generate(out: Path) -> None:
    """Write the generated modules and stubs below ``out``, laid out like the sources.

    Raises:
        RuntimeError: protoc refused the sources; its message is on standard error.
    """
    sources = sorted(str(path) for path in (ROOT / "fuseline").rglob("*.proto"))
    include = str(files("grpc_tools") / "_proto")
    arguments = ["protoc", f"-I{ROOT}", f"-I{include}", f"--python_out={out}", f"--pyi_out={out}"]
    if protoc.main([*arguments, f"--grpc_python_out={out}", *sources]) != 0:
        raise RuntimeError("protoc failed")
    for path in (out / "fuseline" / "v1").glob("*_pb2*.py*"):
        text = ABSOLUTE_IMPORT.sub("from . import", path.read_text())
        path.write_text(ABSOLUTE_STUB_IMPORT.sub(r"from . import \1_pb2 as \2", text))


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
