"""Runs the parts of the suite in order, each in a process of its own, and gathers what they found.

A part that fails, or hangs and is killed, leaves what it found until then, and the parts behind it run all the same.
Results are written after every part.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import report
from .parts import PARTS
from .watch import run_watched

DEFAULT_OUT = report.ROOT / "benchmarks" / "results"
LIMIT_S = 470.0
MIN_PART_S = 15.0  # with less time left nothing begins
WRONG, NO_GPU, INCOMPLETE = 1, 2, 3


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Checks the GPU kernels against float64 and measures them against the memory's speed.",
        epilog="Exit code: 0 all right, 1 something wrong, 2 no GPU, 3 nothing wrong but something did not run.",
    )
    parser.add_argument(
        "--parts",
        type=_parts,
        default=tuple(PARTS),
        help=f"some of {','.join(PARTS)}, or their first words; environment always runs",
    )
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, help="folder for gpu.json, gpu.svg and launches.json"
    )
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="seconds for all of it")
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
        return NO_GPU
    results: dict[str, Any] = {"date": report.today(), "commit": report.commit(), "seconds": {}, "blocks": []}
    results |= {"wrong": [], "failed": [], "skipped": []}
    end = time.monotonic() + options.limit_s
    usable = True
    for name in _selected(options):
        if not usable or end - time.monotonic() < MIN_PART_S:
            results["skipped"].append(name)
            report.write_json(options.out / "gpu.json", results)
            continue
        began = time.monotonic()
        print(f"== {name}", flush=True)
        well = gather(results, name, options, end - began)
        usable = well or name != "environment"  # without the kernels nothing else says anything
        if name == "clusterfusion" and not well:
            options.clusterfusion = None  # or timing would begin to build it again, and say nothing meanwhile
        results["seconds"][name] = round(time.monotonic() - began, 1)
        report.write_json(options.out / "gpu.json", results)
    if results["blocks"] and results.get("environment"):
        report.draw(options.out / "gpu.svg", results)
    if launches := (results.get("tune") or {}).get("table"):
        report.write_json(options.out / "launches.json", launches)  # for FUSELINE_LAUNCHES
    print(summary(results))
    if results["wrong"]:
        return WRONG
    return INCOMPLETE if results["failed"] or results["skipped"] else 0


def gather(results: dict[str, Any], name: str, options: argparse.Namespace, left_s: float) -> bool:
    """Run a part and put what it found, however it ended, into the results; returns whether it came to its end."""
    part = PARTS[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        command = [sys.executable, "-u", "-m", "benchmarks.gpu.part", name]
        command += ["--file", str(path), "--device", options.device]
        if options.clusterfusion is not None:
            command += ["--clusterfusion", str(options.clusterfusion.absolute())]
        ended = run_watched(command, min(part.limit_s, left_s), part.quiet_s, _echo, report.ROOT)
        found = json.loads(path.read_text()) if path.exists() else {"result": None, "wrong": [], "failed": []}
    results["wrong"] += found["wrong"]
    results["failed"] += found["failed"]
    if ended.problem:
        results["failed"].append(f"{name}: {ended.problem}; its last words: {ended.last_line[:300]}")
    if name.startswith("time-"):
        results["blocks"] += found["result"] or []
    else:
        results[name] = found["result"]
    return not ended.problem


def summary(results: dict[str, Any]) -> str:
    """The end of the output: figures, targets, and what was wrong."""
    lines = []
    if results["blocks"]:
        lines.append(report.table(report.BLOCK_HEADER, report.block_rows(results["blocks"])))
    for name, measured, wanted, met in report.targets(results):
        lines.append(f"{'met   ' if met else 'MISSED'} {name} {measured:.2f} (wanted {wanted:.2f})")
    lines += [f"not run: {name}" for name in results["skipped"]]
    lines += [f"FAILED {message}" for message in results["failed"][:20]]
    wrong = results["wrong"]
    lines += [f"WRONG {message}" for message in wrong[:20]]
    lines.append(f"{len(wrong)} wrong results" if wrong else "no wrong result")
    return "\n".join(lines)


def _echo(line: str) -> None:
    print(line, flush=True)


def _selected(options: argparse.Namespace) -> list[str]:
    """The parts to run; the public kernels are built if there is a checkout and they are to be timed."""
    compared = options.clusterfusion is not None and "time-attention" in options.parts
    return [name for name in PARTS if (compared if name == "clusterfusion" else name in options.parts)]


def _parts(text: str) -> tuple[str, ...]:
    """Names of parts, or what is in front of the dash in them, as those in the order in which they run.

    With ``environment`` always: it compiles the kernels, for which no other part has the time.
    """
    names = set(filter(None, text.split(",")))
    groups = {name: {name, name.partition("-")[0]} for name in PARTS}
    unknown = names.difference(*groups.values())
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"parts are {','.join(PARTS)}; not {','.join(unknown) or 'nothing'}")
    return tuple(name for name, group in groups.items() if group & names or name == "environment")
