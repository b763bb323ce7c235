"""Checks and measures the GPU kernels.

    python -m benchmarks.gpu [--parts check,time,tune] [--out FOLDER]

Exits with 0 when all is right, 1 when a result is wrong, 2 without a GPU, and 3 when nothing is wrong but something
failed or did not run. Writes ``gpu.json``, with matplotlib ``gpu.svg``, and after ``tune`` ``launches.json``.
"""

from __future__ import annotations

import importlib.util
import signal
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


def end_on_sigterm() -> None:
    """Let SIGTERM unwind the stack, so that what this process watches (``watch.run_watched``) ends with it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


if __name__ == "__main__":
    end_on_sigterm()
    find_fuseline()
    from .suite import main

    sys.exit(main())
