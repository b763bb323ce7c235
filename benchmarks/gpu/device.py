"""The device the suite runs on: its description, its timer, its copy bandwidth.

``CpuDevice`` stands in where there is no GPU, so that all of the suite but the kernels can be tried; its figures mean
nothing.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fuseline.kernels.cuda.launcher import CAPABILITY

Launch = Callable[[], object]
COPY_BYTES = 2 << 30
REPLAYS = 21
# A captured graph holds as many calls as take about so long, so that one replay dwarfs the events' resolution.
GRAPH_US = 3000.0
MAX_CALLS = 256


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one call: the median of the replays, and their spread from the 10th to the 90th percentile."""

    us: float
    spread_us: float


class Device(Protocol):
    """What the parts of the suite need of a device."""

    torch: torch.device
    l2_bytes: int
    multiprocessors: int

    def describe(self) -> dict[str, str | int | float]:
        """For the report."""
        ...

    def time(self, launches: Sequence[Launch]) -> Timing:
        """Per call, the calls made in this order over and over; each must work on buffers of its own."""
        ...

    def copy_bytes_per_s(self) -> float:
        """Bytes read and written by a large copy, per second."""
        ...

    def check(self) -> None:
        """Raises RuntimeError where a fault has left the device unusable to this process."""
        ...


class CudaDevice:
    """The first GPU.

    Raises:
        RuntimeError: it is no Hopper.
    """

    def __init__(self) -> None:
        self.torch = torch.device("cuda:0")
        self._properties = torch.cuda.get_device_properties(self.torch)
        if (self._properties.major, self._properties.minor) != CAPABILITY:
            raise RuntimeError(f"{self._properties.name} is no Hopper GPU, which the kernels are made for")
        self.l2_bytes = self._properties.L2_cache_size
        self.multiprocessors = self._properties.multi_processor_count
        # One for all timings: blocks have scratch memory for each stream.
        self._stream = torch.cuda.Stream(self.torch)  # type: ignore[no-untyped-call]

    def describe(self) -> dict[str, str | int | float]:
        query = "driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        try:
            state = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            state = "nvidia-smi is not there"
        return {
            "name": self._properties.name,
            "capability": f"{self._properties.major}.{self._properties.minor}",
            "multiprocessors": self.multiprocessors,
            "memory_bytes": self._properties.total_memory,
            "l2_bytes": self.l2_bytes,
            query: state,
        }

    def time(self, launches: Sequence[Launch]) -> Timing:
        """Captured in a CUDA graph and replayed, timed by events around each replay."""
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(self.torch))
        with torch.cuda.stream(stream):
            for _ in range(2):  # so that capturing finds everything loaded and allocated; the second time is timed
                round_us = _events_us(1, lambda: [launch() for launch in launches])[0]
        torch.cuda.current_stream(self.torch).wait_stream(stream)
        rounds = max(1, min(int(GRAPH_US / round_us), MAX_CALLS // len(launches)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(rounds):
                for launch in launches:
                    launch()
        for _ in range(2):
            graph.replay()
        return _timing([us / (rounds * len(launches)) for us in _events_us(REPLAYS, graph.replay)])

    def copy_bytes_per_s(self) -> float:
        source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=self.torch).random_(0, 256)
        target = torch.empty_like(source)
        return 2 * COPY_BYTES / self.time([lambda: target.copy_(source)]).us * 1e6

    def check(self) -> None:
        torch.cuda.synchronize(self.torch)


class CpuDevice:
    """Runs everything on the reference; for trying the suite itself."""

    def __init__(self) -> None:
        self.torch = torch.device("cpu")
        self.l2_bytes = 1 << 20
        self.multiprocessors = 1

    def describe(self) -> dict[str, str | int | float]:
        return {"name": "CPU, of which no figure means anything"}

    def time(self, launches: Sequence[Launch]) -> Timing:
        samples = []
        for _ in range(2):
            start = time.perf_counter()
            for launch in launches:
                launch()
            samples.append((time.perf_counter() - start) * 1e6 / len(launches))
        return _timing(samples)

    def copy_bytes_per_s(self) -> float:
        source = torch.ones(1 << 20, dtype=torch.uint8)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.time([lambda: target.copy_(source)]).us * 1e6

    def check(self) -> None:
        """Nothing breaks here."""


def _events_us(repeats: int, launch: Launch) -> list[float]:
    """Microseconds between events around each of several calls on the current stream; waits for them."""
    pairs = []
    for _ in range(repeats):
        start, end = _event(), _event()
        start.record()
        launch()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in pairs]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _timing(samples: Sequence[float]) -> Timing:
    ordered = sorted(samples)
    tenth = len(ordered) // 10
    return Timing(statistics.median(ordered), ordered[-1 - tenth] - ordered[tenth])
