"""Checks and measures the GPU kernels.

    python -m benchmarks.gpu [--parts environment,correctness,...] [--out FOLDER]

Exits with 1 when any result is wrong. Writes ``gpu.json`` and, with matplotlib, ``gpu.svg``.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def find_fuseline() -> None:
    """Make the checkout the package ``fuseline`` where it is not installed."""
    if importlib.util.find_spec("fuseline") is None:
        spec = importlib.util.spec_from_file_location(
            "fuseline", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        if spec is None or spec.loader is None:
            raise ImportError(f"{ROOT} is not a checkout of fuseline")
        module = importlib.util.module_from_spec(spec)
        sys.modules["fuseline"] = module
        spec.loader.exec_module(module)


if __name__ == "__main__":
    find_fuseline()
    from .suite import main

    sys.exit(main())
