"""Times each block over the launches that there are, and makes a table of the best (``kernels/cuda/choices.py``)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from fuseline.kernels import ops
from fuseline.kernels.cuda import launch
from fuseline.kernels.cuda.choices import Choice, LaunchTable, Spread, Weights
from fuseline.kernels.cuda.launch import HALF_SHARED_BYTES, Problem
from fuseline.kernels.cuda.layout import MAX_SHARED_BYTES
from fuseline.kernels.cuda.library import CudaLibrary

from .blocks import Bench
from .device import Device
from .planning import launched_by, problems
from .shapes import Shape, attention_bytes, floor_us, head_bytes, mlp_bytes

Tensor = torch.Tensor
CLUSTERS = (2, 4, 8)
BATCHES = (1, 16, 64)
CONTEXT = 4096
Call = Callable[[], Tensor | tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Task:
    """One block at one shape and batch; ``calls`` each have buffers of their own, too many for L2 together."""

    shape: str
    problem: Problem
    batch: int
    floor_us: float
    calls: Sequence[Call]

    @property
    def name(self) -> str:
        return f"{self.shape} {self.problem.name} B={self.batch}"


@dataclass(frozen=True, slots=True)
class Trial:
    """One launch of one task."""

    task: Task
    cluster: int
    spread: Spread
    us: float
    spread_us: float

    def record(self) -> dict[str, object]:
        """For the results file."""
        return {
            "shape": self.task.shape,
            "block": self.task.problem.name,
            **asdict(self.spread),
            "cluster": self.cluster,
            "us": self.us,
            "spread_us": self.spread_us,
            "over_floor": self.us / self.task.floor_us,
        }


def tasks(library: CudaLibrary, bench: Bench, shape: Shape, bytes_per_s: float) -> Iterator[Task]:
    """Every block at every batch."""
    mlp, attention, head = problems(library, shape)

    def task(problem: Problem, batch: int, num_bytes: int, calls: Sequence[Call]) -> Task:
        return Task(shape.name, problem, batch, floor_us(num_bytes, bytes_per_s), calls)

    for batch in BATCHES:
        yield task(mlp, batch, mlp_bytes(shape, batch), bench.mlp_calls(batch))
    for batch in BATCHES:
        calls = bench.attention_calls(batch, bench.inputs(batch, CONTEXT))
        yield task(attention, batch, attention_bytes(shape, batch, CONTEXT), calls)
    tables = [ops.prepare_head(table, keep=False) for table in bench.tables()]
    for batch in BATCHES:
        yield task(head, batch, head_bytes(shape, batch, logits=True), bench.head_calls(batch, tables))


def spreads(library: CudaLibrary, problem: Problem, batch: int, cluster: int, multiprocessors: int) -> list[Spread]:
    """The launches to try: rings of half and of all the shared memory, full and at two thirds; clusters as many as
    fit, one CTA a multiprocessor, and as the model says."""
    found: list[Spread] = []
    for budget in (HALF_SHARED_BYTES, MAX_SHARED_BYTES):
        most = launch.most_stages(library, problem, batch, cluster, budget)
        for stages in sorted({most, max(1, most * 2 // 3)}) if most else ():
            resident = launch.resident_clusters(library, problem, batch, cluster, stages, budget)
            if resident < 1:
                continue
            alone = min(resident, multiprocessors // cluster)
            counts = {resident, alone, launch.balanced_clusters(problem, resident, cluster, stages)}
            counts.add(launch.balanced_clusters(problem, alone, cluster, stages))
            found += [Spread(batch, count, stages, budget) for count in sorted(counts)]
    return found


def try_launch(device: Device, task: Task, cluster: int, spread: Spread) -> tuple[Trial, Tensor]:
    """Its time, and the block's output for the first set of buffers."""
    choice = Choice(task.problem.name, task.problem.phases, cluster, (spread,))
    with launched_by(LaunchTable.of([choice])):
        timing = device.time(task.calls)
        result = task.calls[0]()
    output = result if isinstance(result, Tensor) else result[1]
    return Trial(task, cluster, spread, timing.us, timing.spread_us), output


def best_table(trials: Iterable[Trial]) -> LaunchTable:
    """For every block the cluster size that is best over its batches, and with it every batch's best launch."""
    by_block: dict[tuple[str, Weights], dict[int, dict[int, Trial]]] = defaultdict(lambda: defaultdict(dict))
    for trial in trials:
        best = by_block[trial.task.problem.name, trial.task.problem.phases][trial.cluster]
        batch = trial.spread.batch
        if batch not in best or trial.us < best[batch].us:
            best[batch] = trial
    choices = []
    for (block, weights), clusters in by_block.items():
        most = max(len(best) for best in clusters.values())  # only a cluster size that all batches ran with
        complete = {cluster: best for cluster, best in clusters.items() if len(best) == most}
        cluster = min(complete, key=lambda size: math.prod(trial.us for trial in complete[size].values()))
        chosen = sorted(complete[cluster].values(), key=lambda trial: trial.spread.batch)
        choices.append(Choice(block, weights, cluster, tuple(trial.spread for trial in chosen)))
    return LaunchTable.of(choices)
