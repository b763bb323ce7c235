"""All-reduce between the ranks of one machine: shared memory beside gloo.

    python -m benchmarks.all_reduce [--ranks 2] [--rounds 5] [--json PATH]

Each rank is a process of one thread. Both communicators are up at once and take turns in every round, with the same
number of calls of the same sizes; between two calls every rank computes for some microseconds, as it does between two
all-reduces of a step. A call took as long as on the rank where it took longest; percentiles are over the calls of all
rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from fuseline.collectives.communicator import Communicator, CommunicatorStore, make_communicators
from fuseline.collectives.shared_memory import SharedMemoryCommunicator
from fuseline.runtime.sharding import ParallelConfig

SIZES_KIB = (8, 64, 1024)
TARGET_KIB, TARGET_P50_US, TARGET_P99_US = (8, 64), 30.0, 1000.0
NUM_CALLS, NUM_WARM_UP = 1000, 50
TRANSPORTS = ("shm", "gloo")
CPU = torch.device("cpu")
TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Figure:
    """Microseconds of an all-reduce of so much float32."""

    transport: str
    kib: int
    p50_us: float
    p99_us: float
    max_us: float


@dataclass(frozen=True, slots=True)
class Figures:
    """All of them, and what they were taken on."""

    num_ranks: int
    num_rounds: int
    calls_per_round: int
    figures: tuple[Figure, ...]
    machine: str


def time_calls(communicator: Communicator, kib: int) -> list[float]:
    """Microseconds of each call."""
    data, times = torch.zeros(kib * 256), []
    matrix = torch.ones(64, 64) / 64
    communicator.barrier()
    for _ in range(NUM_WARM_UP + NUM_CALLS):
        matrix = matrix @ matrix
        started = time.perf_counter_ns()
        communicator.all_reduce(data)
        times.append((time.perf_counter_ns() - started) / 1000)
    return times[NUM_WARM_UP:]


def run_rank(stores: list[str], rank: int, num_ranks: int, num_rounds: int) -> None:
    """Be a rank; prints the times of its calls, by transport and size."""
    torch.set_num_threads(1)
    groups = {
        transport: make_communicators(
            store, ParallelConfig(num_ranks), rank, CPU, TIMEOUT_S, shared_memory=transport == "shm"
        )
        for transport, store in zip(TRANSPORTS, stores, strict=True)
    }
    if not isinstance(groups["shm"].tp, SharedMemoryCommunicator):
        sys.exit("the ranks cannot share memory here")
    times: dict[str, list[float]] = {f"{transport} {kib}": [] for transport in TRANSPORTS for kib in SIZES_KIB}
    for _ in range(num_rounds):
        for kib in SIZES_KIB:
            for transport, group in groups.items():
                times[f"{transport} {kib}"] += time_calls(group.tp, kib)
    groups["shm"].tp.barrier()
    print(json.dumps(times))


def measure(num_ranks: int, num_rounds: int) -> Figures:
    """Start the ranks and put their times together."""
    stores = [CommunicatorStore() for _ in TRANSPORTS]
    addresses = [store.address for store in stores]
    command = [sys.executable, "-m", "benchmarks.all_reduce", "--ranks", str(num_ranks), "--rounds", str(num_rounds)]
    ranks = [
        subprocess.Popen([*command, "--rank", str(rank), *addresses], stdout=subprocess.PIPE, text=True)
        for rank in range(num_ranks)
    ]
    try:
        outputs = [rank.communicate(timeout=600)[0] for rank in ranks]
        if any(rank.returncode for rank in ranks):
            sys.exit("a rank failed")
    finally:
        for rank in ranks:
            rank.kill()
    of_ranks = [json.loads(output) for output in outputs]
    figures = []
    for name in of_ranks[0]:
        slowest = np.max([times[name] for times in of_ranks], axis=0)
        transport, kib = name.split()
        p50, p99 = np.percentile(slowest, (50, 99))
        figures.append(Figure(transport, int(kib), float(p50), float(p99), float(slowest.max())))
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPUs, load {os.getloadavg()[0]:.1f}"
    return Figures(num_ranks, num_rounds, NUM_CALLS, tuple(figures), machine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("stores", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        run_rank(arguments.stores, arguments.rank, arguments.ranks, arguments.rounds)
        return
    figures = measure(arguments.ranks, arguments.rounds)
    print(f"{figures.num_ranks} ranks, {figures.num_rounds} x {figures.calls_per_round} calls, {figures.machine}")
    print(f"{'':22}{'p50':>10}{'p99':>10}{'worst':>10}  us")
    for kib in SIZES_KIB:
        target = kib in TARGET_KIB and figures.num_ranks == 2
        for figure in (each for each in figures.figures if each.kib == kib):
            note = f"target {TARGET_P50_US:.0f}, {TARGET_P99_US:.0f}" if target and figure.transport == "shm" else ""
            print(
                f"{figure.transport:>8} {figure.kib:>6} KiB {figure.p50_us:>13.1f}{figure.p99_us:>10.0f}"
                f"{figure.max_us:>10.0f}  {note}"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(figures), indent=2) + "\n")


if __name__ == "__main__":
    main()
