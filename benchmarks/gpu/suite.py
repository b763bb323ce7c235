"""Runs the parts of the suite in order, within a time limit, and gathers what they found."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import report
from .device import CpuDevice, CudaDevice, Device
from .parts import PARTS, Run

DEFAULT_OUT = report.ROOT / "benchmarks" / "results"
LIMIT_S = 480.0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Checks the GPU kernels against float64 and measures them against the memory's speed.",
    )
    parser.add_argument(
        "--parts", type=_parts, default=tuple(PARTS), help=f"some of {','.join(PARTS)}; default: all, in this order"
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder for gpu.json and gpu.svg")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="seconds after which no new part begins")
    parser.add_argument(
        "--clusterfusion", type=Path, help="a checkout of the public ClusterFusion, to compare with its kernel"
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: try the suite itself, small and on the reference; its figures mean nothing",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("There is no GPU here. --device cpu tries the suite without.")
        return 2
    device: Device = CudaDevice() if options.device == "cuda" else CpuDevice()
    run = Run(device, tiny=options.device == "cpu", clusterfusion=options.clusterfusion)
    results: dict[str, Any] = {"date": report.today(), "commit": report.commit(), "seconds": {}, "skipped": []}
    start = time.monotonic()
    for name in options.parts:
        if time.monotonic() - start > options.limit_s:
            results["skipped"].append(name)
            continue
        began = time.monotonic()
        print(f"== {name}", flush=True)
        results[name] = PARTS[name](run)
        results["seconds"][name] = round(time.monotonic() - began, 1)
        report.write_json(options.out / "gpu.json", results)  # so that a part that dies leaves the others' results
    results["wrong"] = run.wrong
    report.write_json(options.out / "gpu.json", results)
    if results.get("blocks") and "environment" in results:
        report.draw(options.out / "gpu.svg", results)
    print(summary(results))
    return 1 if run.wrong else 0


def summary(results: dict[str, Any]) -> str:
    """The end of the output: figures, targets, and what was wrong."""
    lines = []
    if results.get("blocks"):
        lines.append(report.table(report.BLOCK_HEADER, report.block_rows(results["blocks"])))
    for name, measured, wanted, met in report.targets(results):
        lines.append(f"{'met   ' if met else 'MISSED'} {name} {measured:.2f} (wanted {wanted:.2f})")
    lines += [f"not run for lack of time: {name}" for name in results["skipped"]]
    wrong = results["wrong"]
    lines += [f"WRONG {message}" for message in wrong[:20]]
    lines.append(f"{len(wrong)} wrong results" if wrong else "no wrong result")
    return "\n".join(lines)


def _parts(text: str) -> tuple[str, ...]:
    names = tuple(filter(None, text.split(",")))
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"parts are {','.join(PARTS)}; not {','.join(unknown) or 'nothing'}")
    return tuple(name for name in PARTS if name in names)
