"""Times each block over the launches that there are, and makes a table of the best (``kernels/cuda/choices.py``)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch

from fuseline.kernels.cuda import launch
from fuseline.kernels.cuda.attention import AttentionTensors, attention_block, attention_problem
from fuseline.kernels.cuda.choices import Choice, LaunchTable, Spread, Weights
from fuseline.kernels.cuda.head import head_logits, head_problem
from fuseline.kernels.cuda.launch import HALF_SHARED_BYTES, Problem
from fuseline.kernels.cuda.launcher import Launcher
from fuseline.kernels.cuda.layout import MAX_SHARED_BYTES
from fuseline.kernels.cuda.library import CudaLibrary
from fuseline.kernels.cuda.mlp import mlp_block, mlp_problem
from fuseline.kernels.packed import pack

from .blocks import DecodeInputs
from .device import Device
from .inputs import Source
from .shapes import BLOCK_SIZE, EPS, Shape, attention_bytes, buffer_sets, floor_us, head_bytes, mlp_bytes

Tensor = torch.Tensor
CLUSTERS = (2, 4, 8)
BATCHES = (1, 16, 64)
CONTEXT = 4096
Call = Callable[[Launcher], Tensor]


@dataclass(frozen=True, slots=True)
class Task:
    """One block at one shape and batch; ``calls`` each have buffers of their own, too many for L2 together."""

    shape: str
    problem: Problem
    batch: int
    floor_us: float
    calls: tuple[Call, ...]

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


def tasks(library: CudaLibrary, device: Device, shape: Shape, bytes_per_s: float) -> Iterator[Task]:
    """Every block at every batch; weights are random."""
    source = Source(device.torch, 3)
    sets = buffer_sets(shape.attention_weight_bytes, device.l2_bytes)
    layers = [source.layer(shape) for _ in range(sets)]
    packed = [
        (pack(layer.mlp.gate_up, 2 * shape.inner), pack(layer.mlp.down))  # type: ignore[arg-type]
        for layer in layers[: buffer_sets(shape.mlp_weight_bytes, device.l2_bytes)]
    ]
    norm = layers[0].mlp.norm
    problem = mlp_problem(library, shape.hidden, shape.inner, EPS)
    for batch in BATCHES:
        stream = [source.stream(batch, shape.hidden) for _ in range(2)]
        calls = [partial(_mlp, stream, norm, *weights) for weights in packed]
        yield Task(shape.name, problem, batch, floor_us(mlp_bytes(shape, batch), bytes_per_s), tuple(calls))
    for batch in BATCHES:
        inputs = DecodeInputs(shape, device, source, batch, CONTEXT, sets)
        stream = [source.stream(batch, shape.hidden) for _ in range(2)]
        spec, step = layers[0].spec, inputs.step
        cache = inputs.caches[0]
        problem = attention_problem(
            library,
            shape.hidden,
            shape.heads,
            tuple(cache.shape),
            CONTEXT // BLOCK_SIZE,
            scale=1.0,
            eps=EPS,
            window=0,
        )
        tensors = [
            AttentionTensors(
                layer.attention.norm,
                pack(layer.attention.qkv, shape.head_dim),  # type: ignore[arg-type]
                None,
                layer.attention.q_norm,
                layer.attention.k_norm,
                pack(layer.attention.out),  # type: ignore[arg-type]
                None,
                *inputs.rotary,
                inputs.caches[i % len(inputs.caches)],
                step.block_tables,
                step.context_lens,
            )
            for i, layer in enumerate(layers)
        ]
        calls = [partial(_attention, stream, each, spec.scale) for each in tensors]
        num_bytes = attention_bytes(shape, batch, CONTEXT)
        yield Task(shape.name, problem, batch, floor_us(num_bytes, bytes_per_s), tuple(calls))
    table = pack(source.normal(shape.vocab, shape.hidden, std=shape.hidden**-0.5))
    problem = head_problem(library, shape.hidden, shape.vocab, 0, EPS)
    for batch in BATCHES:
        stream = [source.stream(batch, shape.hidden) for _ in range(2)]
        rows = torch.arange(batch, device=device.torch)
        floor = floor_us(head_bytes(shape, batch, logits=True), bytes_per_s)
        yield Task(shape.name, problem, batch, floor, (partial(_head, stream, norm, table, shape.vocab, rows),))


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


def try_launch(
    library: CudaLibrary, device: Device, task: Task, cluster: int, spread: Spread
) -> tuple[Trial, Tensor]:
    """Its time, and the block's output for the first set of buffers."""
    choice = Choice(task.problem.name, task.problem.phases, cluster, (spread,))
    launcher = Launcher(library, LaunchTable.of([choice]))
    timing = device.time([partial(call, launcher) for call in task.calls])
    return Trial(task, cluster, spread, timing.us, timing.spread_us), task.calls[0](launcher)


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


def _mlp(stream: list[Tensor], norm: Tensor, gate_up: Tensor, down: Tensor, launcher: Launcher) -> Tensor:
    return mlp_block(launcher, stream[0], stream[1], norm, gate_up, None, down, None, EPS)[1]


def _attention(stream: list[Tensor], tensors: AttentionTensors, scale: float, launcher: Launcher) -> Tensor:
    return attention_block(launcher, stream[0], stream[1], tensors, scale, EPS, 0)[1]


def _head(stream: list[Tensor], norm: Tensor, table: Tensor, vocab: int, rows: Tensor, launcher: Launcher) -> Tensor:
    return head_logits(launcher, stream[0], stream[1], norm, table, vocab, rows, EPS)
