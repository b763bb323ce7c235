"""How a block is spread over the GPU: cluster size, clusters, stages; and its scratch memory.

The cluster size decides the order of sums, so it depends on a layer's shape only, never on the batch: a row keeps its
bits. A batch that does not fit at that size is run in parts. Everything else is free, and chosen by a model of the
memory's latency and bandwidth, unless a table of measured launches (choices.py) has the shape.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..errors import KernelArgumentError, LaunchError
from .choices import LaunchTable
from .layout import MAX_SHARED_BYTES, MULTIPROCESSOR_SHARED_BYTES, RESERVED_SHARED_BYTES, tiles, units_of
from .library import CudaLibrary

# In this order, the first at which the largest batch fits: few CTAs share an exchange, many share x.
CLUSTERS = (4, 8, 2, 1)
# Twice what keeps the memory busy (see bytes_in_flight_needed).
MIN_STAGES = 2
# Half a multiprocessor: the next block's CTA can start beside this one and fill its rings before this one ends.
HALF_SHARED_BYTES = MULTIPROCESSOR_SHARED_BYTES // 2 - RESERVED_SHARED_BYTES
# Of an H200, for choosing among launches; a wrong figure costs time, not results.
BYTES_PER_S = 4.3e12
LATENCY_S = 0.8e-6
CTA_BYTES_PER_S = 50e9  # what one multiprocessor is trusted to take in
MAX_SCRATCH = 256


@dataclass(frozen=True, slots=True)
class Launch:
    """What ``fl_launch`` holds, the most tokens that one launch takes, and how many clusters would fit at once."""

    cluster: int
    num_clusters: int
    stages: int
    max_shared_bytes: int
    max_batch: int
    resident: int


@dataclass(frozen=True, slots=True)
class Problem:
    """One block of one shape on one device, and how to ask the library about it.

    Attributes:
        name: of the library's functions, as in fl_cuda_<name>_limits.
        entry: the function that launches it.
        dims: whatever of the arguments the plan and the size of the scratch memory depend on, but the batch.
        phases: rows and columns of the weights that are streamed one after the other.
        arguments: an argument struct for a batch, its launch and pointers not filled in.
    """

    name: str
    entry: str
    dims: tuple[int, ...]
    phases: tuple[tuple[int, int], ...]
    arguments: Callable[[int], ctypes.Structure]

    @property
    def key(self) -> tuple[object, ...]:
        """Problems of equal keys are planned alike, and share scratch memory where they need as much."""
        return (self.name, *self.dims)


def plan_launch(library: CudaLibrary, problem: Problem, batch: int, table: LaunchTable) -> Launch:
    """Choose for a batch on the current device, from the table as far as the device can run what it says.

    Raises:
        KernelArgumentError: the block fits in no way, even for one token.
        LaunchError: the device cannot run it.
    """
    choice = table.find(problem.name, problem.phases)
    if choice is not None and shared_bytes(library, problem, 1, choice.cluster, MIN_STAGES) > MAX_SHARED_BYTES:
        choice = None  # measured with other kernels: in these not even one token fits
    cluster, max_batch = choose_cluster(library, problem, CLUSTERS if choice is None else (choice.cluster,))
    taken, budget = min(batch, max_batch), HALF_SHARED_BYTES
    spread = None if choice is None else choice.spread(taken)
    if spread is not None:
        budget = spread.max_shared_bytes
        resident = resident_clusters(library, problem, taken, cluster, spread.stages, budget)
        if spread.num_clusters <= resident:
            return Launch(cluster, spread.num_clusters, spread.stages, budget, max_batch, resident)
        budget = HALF_SHARED_BYTES
    stages = most_stages(library, problem, taken, cluster, budget)
    if stages < MIN_STAGES:
        budget = MAX_SHARED_BYTES
        stages = most_stages(library, problem, taken, cluster, budget)
    resident = resident_clusters(library, problem, taken, cluster, stages, budget)
    if resident < 1:
        raise LaunchError(f"fl_cuda_{problem.name}: no cluster of {cluster} CTAs fits this device")
    num_clusters = balanced_clusters(problem, resident, cluster, stages)
    return Launch(cluster, num_clusters, stages, budget, max_batch, resident)


def predicted_s(phases: Sequence[tuple[int, int]], num_clusters: int, cluster: int, stages: int) -> float:
    """Seconds that streaming the phases' weights takes.

    All warps stream at the memory's speed or at what they have in flight; then those with a unit more than others
    finish alone.
    """
    sizes = tiles()
    warps = num_clusters * cluster * sizes["LINEAR_WARPS"]
    warp_bytes_per_s = stages * sizes["PIECE_BYTES"] / LATENCY_S
    total = 0.0
    for rows, cols in phases:
        units = rows // sizes["UNIT_ROWS"]
        busiest = max(len(units_of(units, index, num_clusters, 0)) for index in range(num_clusters))
        mean = units / (num_clusters * sizes["LINEAR_WARPS"])
        alone_bytes = (busiest - mean) * 2 * sizes["UNIT_ROWS"] * cols / cluster
        bytes_per_s = min(BYTES_PER_S, num_clusters * cluster * CTA_BYTES_PER_S, warps * warp_bytes_per_s)
        total += 2 * rows * cols / bytes_per_s + alone_bytes / warp_bytes_per_s
    return total


def shared_bytes(
    library: CudaLibrary, problem: Problem, batch: int, cluster: int, stages: int, budget: int = MAX_SHARED_BYTES
) -> int:
    """Shared memory of a CTA that may have ``budget``, as far as it has a choice; needs no driver.

    More than there is where a launch is not possible.
    """
    found: int = _limits(library, problem, batch, cluster, stages, budget).shared_bytes
    return found or MAX_SHARED_BYTES + 1


def choose_cluster(library: CudaLibrary, problem: Problem, clusters: Sequence[int] = CLUSTERS) -> tuple[int, int]:
    """The cluster size of a shape, and the largest power of two of tokens that fits with it."""
    batch = tiles()["MAX_BATCH"]
    while batch:
        for cluster in clusters:
            if shared_bytes(library, problem, batch, cluster, MIN_STAGES) <= MAX_SHARED_BYTES:
                return cluster, batch
        batch //= 2
    raise KernelArgumentError(f"{problem.name}: weights {problem.phases} fit no cluster")


def most_stages(library: CudaLibrary, problem: Problem, batch: int, cluster: int, budget: int) -> int:
    """That a CTA with so much shared memory has room for; 0 if it does not fit at all."""
    fitting = (
        stages
        for stages in range(tiles()["MAX_STAGES"], 0, -1)
        if shared_bytes(library, problem, batch, cluster, stages, budget) <= budget
    )
    return next(fitting, 0)


def resident_clusters(
    library: CudaLibrary, problem: Problem, batch: int, cluster: int, stages: int, budget: int
) -> int:
    """How many clusters the current device runs at once, and the kernel takes."""
    found: int = _limits(library, problem, batch, cluster, stages, budget).max_clusters
    return found


def balanced_clusters(problem: Problem, resident: int, cluster: int, stages: int) -> int:
    """The number of clusters, of those that are resident at once, that the model finds fastest."""
    counts = range(max(1, resident // 2), resident + 1)
    return min(counts, key=lambda clusters: predicted_s(problem.phases, clusters, cluster, stages))


def _limits(
    library: CudaLibrary, problem: Problem, batch: int, cluster: int, stages: int, budget: int
) -> ctypes.Structure:
    """The library's answer; ``shared_bytes`` is filled in even where the device refuses."""
    args, limits = problem.arguments(batch), library.header.structs["fl_limits"]()
    args.launch = library.header.structs["fl_launch"](
        cluster=cluster, num_clusters=1, stages=stages, max_shared_bytes=budget
    )
    library.call(f"fl_cuda_{problem.name}_limits", ctypes.byref(args), ctypes.byref(limits))
    return limits


class Scratch:
    """Scratch memory of the kernels: a piece for each use and size on each stream, zeroed once, never given back.

    A captured graph keeps pointers into it, so a piece is never moved; it is made for the largest batch at once.
    """

    def __init__(self) -> None:
        self._pieces: dict[tuple[object, ...], torch.Tensor] = {}

    def get(self, key: tuple[object, ...], num_bytes: int, device: torch.device) -> torch.Tensor:
        """The piece of ``key`` that has ``num_bytes``, on the current stream of ``device``.

        Raises:
            LaunchError: a graph is being captured and the piece does not exist yet; or there are too many.
        """
        stream = torch.cuda.current_stream(device).cuda_stream
        found = (*key, num_bytes, device, stream)
        piece = self._pieces.get(found)
        if piece is None:
            if torch.cuda.is_current_stream_capturing():
                raise LaunchError("run a block once on this stream before capturing it: it needs scratch memory")
            if len(self._pieces) >= MAX_SCRATCH:
                raise LaunchError(f"more than {MAX_SCRATCH} kinds of scratch memory on all streams")
            piece = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
            self._pieces[found] = piece
        return piece
