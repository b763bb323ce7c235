"""This runtime beside its peers, on one CPU, in one run.

    python -m benchmarks.peers [--models a110m b05b] [--peers fuseline llama.cpp ...] [--rounds 3] [--venvs FOLDER]

Makes random-weight Llama checkpoints of 110M, 0.5B and 1.2B parameters and runs every peer that is installed on them,
in turns, each cell in a process of its own with all cores: prefill of 512 tokens, greedy decode of 1, 4 and 16
sequences from prompts of 32 tokens (48, 32 and 16 steps; the first token is not counted), from launching the process
to the first token, and the most memory it held. Prompts are random and never the same twice; each cell is one round,
and repeats within it are bounded in time. "same" and "near" say how many of 64 greedy tokens are the first choice, or
among the first ten, of transformers in float32: whether a peer computes the same thing, and how much its quantisation
costs.

Peers are taken from this environment, from FOLDER/<peer>/bin/python, or where ``--peer NAME=PYTHON`` says. Converted
models, logs and the cells so far are kept in the work folder; with ``--resume`` a run goes on where one was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from .cells import OURS, PEERS, Cell, Laboratory, check_agreement
from .checkpoints import SHAPES, write
from .report import METRICS, Row, floor, make_row, print_ratios, print_rows, ratios

WORK = Path("~/.cache/fuseline/peers").expanduser()
GIB = 1 << 30


def read_bandwidth() -> float:
    """Bytes per second that all cores read from memory: the best of some passes over half a GiB, summed or copied."""
    data = torch.ones(GIB // 8)
    other = torch.empty_like(data)
    best = 0.0
    for _ in range(4):
        started = time.perf_counter()
        data.sum()
        summed = time.perf_counter()
        other.copy_(data)
        best = max(best, data.nbytes / (summed - started), 2 * data.nbytes / (time.perf_counter() - summed))
    return best


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def find_pythons(given: list[str], venvs: Path | None) -> dict[str, str]:
    pythons = dict.fromkeys(PEERS, sys.executable)
    for peer in PEERS:
        if venvs is not None and (venvs / peer / "bin" / "python").exists():
            pythons[peer] = str(venvs / peer / "bin" / "python")
    for each in given:
        name, _, python = each.partition("=")
        if name not in PEERS or not python:
            sys.exit(f"--peer takes NAME=PYTHON with a name of {', '.join(PEERS)}, not {each!r}")
        pythons[name] = python
    return pythons


def measure(laboratory: Laboratory, arguments: argparse.Namespace) -> float:
    """Convert what has to be, then run all cells, round by round; returns the median of the rounds' bandwidths."""
    bandwidths = []
    checkpoints = {model: write(model, arguments.work / "checkpoints") for model in arguments.models}
    peers = [peer for peer in arguments.peers if laboratory.installed(peer)]
    for peer in arguments.peers:
        if peer not in peers:
            print(f"{peer}: not installed")
    kinds = [
        (model, peer, mode)
        for model in arguments.models
        for peer in peers
        for mode in PEERS[peer].modes
        if f"{peer} {mode}" not in arguments.without
    ]
    for model, peer, mode in list(kinds):
        if error := laboratory.prepare(model, peer, mode, checkpoints[model]):
            print(f"{model} {peer} {mode} cannot be converted: {error}", flush=True)
    for number in range(arguments.rounds):
        bandwidths.append(read_bandwidth())
        for model, peer, mode in list(kinds):
            started = time.monotonic()
            cell = laboratory.run(Cell(model, peer, mode, number), checkpoints[model])
            seconds = time.monotonic() - started
            print(f"round {number + 1}, {model} {peer} {mode}, {seconds:.0f} s: {outcome_of(cell)}", flush=True)
            if seconds > arguments.patience:
                kinds.remove((model, peer, mode))
    return statistics.median(bandwidths or [0.0])


def outcome_of(cell: Cell) -> str:
    rates = {"prefill": cell.prefill, **{f"B{batch}": rates for batch, rates in cell.decode.items()}}
    shown = [f"{metric} {statistics.median(values):.1f}" for metric, values in rates.items() if values]
    return ", ".join([*shown, *([f"FAILED: {cell.error}"] if cell.error else [])])


def make_rows(laboratory: Laboratory, arguments: argparse.Namespace) -> list[Row]:
    rows = []
    for model in arguments.models:
        cells = [cell for cell in laboratory.cells if cell.model == model]
        try:
            ranks = check_agreement(cells, arguments.work / "checkpoints" / model)
        except ImportError:
            print("transformers are not installed here: what the peers compute is not checked")
            ranks = {}
        for kind in dict.fromkeys((cell.peer, cell.mode) for cell in cells):
            rows.append(make_row([cell for cell in cells if (cell.peer, cell.mode) == kind], ranks.get(kind)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help=f"{OURS} is one of them")
    modes = [f"{peer} {mode}" for peer in PEERS for mode in PEERS[peer].modes]
    parser.add_argument("--without", nargs="+", choices=modes, default=[], metavar="MODE", help="such as 'vllm bf16'")
    parser.add_argument("--rounds", type=int, default=3, help="0 only converts the models")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help="a peer's interpreter")
    parser.add_argument("--venvs", type=Path, help="a folder of virtual environments named like the peers")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds after which a cell is stopped")
    parser.add_argument(
        "--patience",
        type=float,
        default=60.0,
        help="a cell that takes more seconds is not repeated in further rounds",
    )
    parser.add_argument("--work", type=Path, default=WORK, help="checkpoints, converted models and logs")
    parser.add_argument("--resume", action="store_true", help="keep the cells of the run before")
    parser.add_argument("--json", type=Path, help="write everything here as well")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the cell under way must not outlive this
    arguments.work = arguments.work.absolute()
    laboratory = Laboratory(
        arguments.work, find_pythons(arguments.peer, arguments.venvs), arguments.timeout, resume=arguments.resume
    )
    bytes_per_s = measure(laboratory, arguments)
    if not laboratory.cells:
        return
    rows = make_rows(laboratory, arguments)
    machine = f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores"
    print(f"\n{machine}, reads {bytes_per_s / 1e9:.1f} GB/s, load {os.getloadavg()[0]:.1f}")
    print_rows(rows, bytes_per_s)
    found = ratios(rows)
    print_ratios(found)
    if arguments.json:
        floors = [
            {"model": model, "kind": kind, "metric": metric, "tokens_per_s": floor(model, kind, metric, bytes_per_s)}
            for model, kind in dict.fromkeys((row.model, row.kind) for row in rows)
            for metric in METRICS
        ]
        everything = {
            "machine": machine,
            "gb_per_s": bytes_per_s / 1e9,
            "rows": [asdict(row) for row in rows],
            "ratios": [asdict(each) for each in found],
            "floors": floors,
        }
        arguments.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
