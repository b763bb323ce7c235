"""One part of the suite in a process of its own: ``python -m benchmarks.gpu.part NAME --file FILE``."""

from __future__ import annotations

import argparse
from pathlib import Path

from .__main__ import end_on_sigterm, find_fuseline


def run(name: str, path: Path, device: str, clusterfusion: Path | None = None) -> None:
    """Run a part; ``path`` always holds what has been found so far.

    Raises:
        RuntimeError: the GPU is none that the kernels are for, or they are missing: torch would take their place.
    """
    import gc

    from fuseline.kernels.cuda.library import load_library

    from .device import CpuDevice, CudaDevice, Device
    from .parts import PARTS, Run

    gc.freeze()  # capturing a graph collects garbage, and all that has been imported is none
    on: Device = CudaDevice() if device == "cuda" else CpuDevice()
    if device == "cuda":
        load_library()
    found = Run(on, device == "cpu", path, clusterfusion)
    found.keep(PARTS[name].run(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--clusterfusion", type=Path)
    options = parser.parse_args()
    end_on_sigterm()
    find_fuseline()
    run(options.name, options.file, options.device, options.clusterfusion)
