"""The parts of the suite: each takes a ``Run`` and returns what goes into the results under its name."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fuseline.kernels.cuda.choices import default_table
from fuseline.kernels.cuda.launch import plan_launch
from fuseline.kernels.cuda.library import CudaLibrary, load_library
from fuseline.kernels.errors import KernelArgumentError

from . import baselines, collectives, correctness, public, report, tune
from .blocks import Bench, Figure
from .cases import TINY
from .device import Device
from .planning import problems
from .shapes import BATCHES, CONTEXTS, SHAPES
from .watch import GRACE_S, run_watched

SANITIZER_LIMIT_S = 60.0
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


@dataclass
class Run:
    """What a part works with, and where it leaves what it has found.

    Attributes:
        tiny: shapes that a CPU can afford.
        path: of a file for ``keep``.
        clusterfusion: a checkout of the public kernels.
        wrong: every wrong result found so far, in words.
        failed: whatever raised an error instead of giving a result, in words.
        latest: the last result that was kept.
    """

    device: Device
    tiny: bool
    path: Path
    clusterfusion: Path | None = None
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    latest: Any = None

    @cached_property
    def bytes_per_s(self) -> float:
        """The copy bandwidth of this run."""
        return self.device.copy_bytes_per_s()

    def keep(self, result: Any) -> None:
        """Write down what there is: whatever happens next, it is not lost."""
        self.latest = result
        report.write_json(self.path, {"result": result, "wrong": self.wrong, "failed": self.failed})

    def attempt(self, name: str, work: Callable[[], Any]) -> Any:
        """What ``work`` returns; None if it raises an error, which is noted. Its name is printed before it begins.

        Raises:
            RuntimeError: the device can no longer be used.
        """
        print(f"   {name}", flush=True)
        try:
            return work()
        except (RuntimeError, KernelArgumentError) as error:
            self.failed.append(f"{name}: {type(error).__name__}: {str(error)[:500]}")
            print(f"   FAILED {self.failed[-1]}", flush=True)
            self.keep(self.latest)
            self.device.check()
            return None


def environment(run: Run) -> dict[str, Any]:
    """Device, versions, copy bandwidth, the library and how many of each kernel's clusters fit."""
    found: dict[str, Any] = {
        "device": run.device.describe(),
        "copy_bytes_per_s": run.bytes_per_s,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "numpy": np.__version__,
        "flashinfer": baselines.has_flashinfer(),
        "compiled_baseline": baselines.elementwise(run.device.torch).compiled,
    }
    print(f"{found['device']['name']}: copies {run.bytes_per_s / 1e12:.2f} TB/s, torch {torch.__version__}")
    run.keep(found)
    if not run.tiny:
        found["library"] = load_library().path.name
        found["launches"] = run.attempt("launches", partial(launches, load_library())) or []
        header = ("shape", "block", "batch", "cluster", "clusters", "resident", "stages")
        print(report.table(header, [list(row.values()) for row in found["launches"]]))
    return found


def launches(library: CudaLibrary) -> list[dict[str, Any]]:
    """How each block is spread over this GPU, and how many of its clusters cudaOccupancyMaxActiveClusters allows."""
    rows = []
    for shape in SHAPES:
        for problem in problems(library, shape):
            for batch in BATCHES:
                plan = plan_launch(library, problem, batch, default_table())
                rows.append(
                    {
                        "shape": shape.name,
                        "block": problem.name,
                        "batch": batch,
                        "cluster": plan.cluster,
                        "num_clusters": plan.num_clusters,
                        "resident": plan.resident,
                        "stages": plan.stages,
                    }
                )
    return rows


def check(op: str, run: Run) -> dict[str, Any]:
    """One op on its edges."""
    checks = correctness.Checks(wrong=run.wrong)
    for name, work in correctness.checks_of(op, run.device.torch, tiny=run.tiny):
        run.attempt(f"{op}, {name}", partial(work, checks))
        run.keep({"num_checked": checks.num_checked})
    print(f"{checks.num_checked} checks, {len(checks.wrong)} wrong")
    return {"num_checked": checks.num_checked}


def sanitize(run: Run) -> dict[str, Any]:
    """compute-sanitizer's tools over one small run of every op; what is found counts as wrong."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None or run.tiny:
        print("skipped: no compute-sanitizer")
        if not run.tiny:
            run.failed.append("compute-sanitizer is not installed")
        return {"skipped": "no compute-sanitizer"}
    found = {}
    for name in TOOLS:
        command = [tool, "--tool", name, "--error-exitcode", "7", sys.executable, "-m", "benchmarks.gpu.sanitized"]
        found[name] = _sanitize_with(command)
        print(f"{name}: {found[name]}", flush=True)
        if found[name] == "errors":
            run.wrong.append(f"compute-sanitizer: {name} found errors")
        elif found[name] != "clean":
            run.failed.append(f"compute-sanitizer: {name} {found[name]}")
        run.keep(found)
    return found


def _sanitize_with(command: list[str]) -> str:
    environment = {**os.environ, "FUSELINE_CUDA_LIBRARY": str(load_library().path)}
    lines: list[str] = []
    limits = (SANITIZER_LIMIT_S, SANITIZER_LIMIT_S)
    # It ends sooner than whoever watches this part waits for it.
    done = run_watched(command, *limits, lines.append, report.ROOT, environment, grace_s=GRACE_S / 4)
    if done.exit_code == 7:
        print("\n".join(lines[-60:]))
        return "errors"
    return "clean" if not done.problem else f"did not run: {done.problem}; {done.last_line[-300:]}"


def build_clusterfusion(run: Run) -> None:
    """Compiles the public kernels: for minutes, in which nothing is said, and which no part that times has."""
    if run.clusterfusion is not None:
        public.load(run.clusterfusion)


def time_blocks(block: str, run: Run) -> list[dict[str, Any]]:
    """One block at every shape, batch and context; with attention the whole layer too."""
    pieces = baselines.elementwise(run.device.torch)
    extension = None
    if block == "attention" and run.clusterfusion is not None:
        extension = run.attempt("public ClusterFusion, built before", partial(public.load, run.clusterfusion))
    figures: list[dict[str, Any]] = []
    targets_first = sorted(SHAPES, key=lambda shape: shape.name not in report.TARGET_SHAPES)
    for shape in (TINY,) if run.tiny else targets_first:
        bench = Bench(shape, run.device, run.bytes_per_s, pieces, extension)
        first = len(figures)
        for name, work in _timings(block, bench, tiny=run.tiny):
            found: list[Figure] = run.attempt(f"{shape.name} {block} {name}", work) or []
            figures += [figure.record() for figure in found]
            run.keep(figures)
        print(report.table(report.BLOCK_HEADER, report.block_rows(figures[first:])), flush=True)
    return figures


def _timings(block: str, bench: Bench, *, tiny: bool) -> Iterator[tuple[str, Callable[[], list[Figure]]]]:
    batches, contexts = ((1, 2), (32,)) if tiny else (BATCHES, CONTEXTS)
    for batch in batches:
        if block == "attention":
            for context in contexts:
                yield f"B={batch} context {context}", partial(bench.attention, batch, context)
        else:
            yield f"B={batch}", partial(bench.mlp if block == "mlp" else bench.head, batch)


def tune_launches(run: Run) -> dict[str, Any]:
    """Each block of the target shapes over its launches; all launches of a cluster size must give the same bits."""
    trials: list[tune.Trial] = []
    pieces = baselines.elementwise(run.device.torch)
    for shape in () if run.tiny else (shape for shape in SHAPES if shape.name in report.TARGET_SHAPES):
        bench = Bench(shape, run.device, run.bytes_per_s, pieces)
        for task in tune.tasks(load_library(), bench, shape, run.bytes_per_s):
            for cluster in tune.CLUSTERS:
                trials += _tune_cluster(run, task, cluster)
            run.keep({"trials": [trial.record() for trial in trials], "table": tune.best_table(trials).records()})
    table = tune.best_table(trials).records()
    print("\n".join(json.dumps(record) for record in table))
    return {"trials": [trial.record() for trial in trials], "table": table}


def _tune_cluster(run: Run, task: tune.Task, cluster: int) -> Iterator[tune.Trial]:
    """Every launch of a task with clusters of one size."""
    expected: torch.Tensor | None = None
    for spread in tune.spreads(load_library(), task.problem, task.batch, cluster, run.device.multiprocessors):
        name = f"{task.name}: {cluster} x {spread.num_clusters} CTAs, {spread.stages} stages"
        found = run.attempt(name, partial(tune.try_launch, run.device, task, cluster, spread))
        if found is None:
            continue
        trial, output = found
        print(f"      {trial.us:.1f} us, {trial.us / task.floor_us:.2f} x floor", flush=True)
        if expected is not None and not torch.equal(output, expected):
            run.wrong.append(f"{name}: the bits depend on the launch")
        expected = output
        yield trial


def on_chip(run: Run) -> list[dict[str, Any]]:
    """Latency and bandwidth between the SMs of a cluster, for each cluster size."""
    if run.tiny:
        return []
    found = []
    for cluster in collectives.CLUSTERS:
        work = partial(collectives.distributed_memory, load_library(), run.device, cluster)
        if row := run.attempt(f"clusters of {cluster}", work):
            found.append(row)
            run.keep(found)
    rows = [
        [row["cluster"], row["latency_cycles"], row["loads_bytes_per_s"] / 1e12, row["copies_bytes_per_s"] / 1e12]
        for row in found
    ]
    print(report.table(("cluster", "load cycles", "loads TB/s", "copies TB/s"), rows))
    return found


def reduce_gather(run: Run) -> list[dict[str, Any]]:
    """Each collective in each form, cluster size and length; wrong sums count as wrong."""
    if run.tiny:
        return []
    found, rows = [], []
    for kind in collectives.KINDS:
        for cluster in collectives.CLUSTERS:
            for elements in collectives.ELEMENTS:
                work = partial(collectives.measure, load_library(), run.device, kind, cluster, elements)
                figure = run.attempt(f"{kind} of {cluster} CTAs, {elements} elements", work)
                if figure is None:
                    continue
                run.wrong += [f"{kind} of {cluster} CTAs, {elements} elements: {form}" for form in figure.wrong]
                found.append(figure.record())
                run.keep(found)
                each = [figure.us.get(form, "-") for form in collectives.FORMS]
                rows.append([kind, cluster, elements, *each, found[-1]["speedup"] or "-"])
    print(report.table(("us", "cluster", "elements", *collectives.FORMS, "x faster"), rows))
    return found


@dataclass(frozen=True, slots=True)
class Part:
    """What runs, for how long at most, and how long it may say nothing: a kernel that hangs says nothing."""

    run: Callable[[Run], Any]
    limit_s: float
    quiet_s: float = 45.0


# In this order: first what is right, then what is fast, and last what takes long and says least.
PARTS = {
    "environment": Part(environment, 200, 180),  # compiles the kernels
    "check-mlp": Part(partial(check, "mlp"), 60),
    "check-head": Part(partial(check, "head"), 60),
    "check-attention": Part(partial(check, "attention"), 120),
    "check-clusters": Part(partial(check, "clusters"), 60),
    "check-replays": Part(partial(check, "replays"), 60),
    "clusterfusion": Part(build_clusterfusion, 240, 240),
    "time-mlp": Part(partial(time_blocks, "mlp"), 90),
    "time-attention": Part(partial(time_blocks, "attention"), 180),
    "time-head": Part(partial(time_blocks, "head"), 60),
    "collectives": Part(reduce_gather, 60),
    "dsmem": Part(on_chip, 30),
    "tune": Part(tune_launches, 150),
    "sanitize": Part(sanitize, 4 * SANITIZER_LIMIT_S + 10, 2 * SANITIZER_LIMIT_S),
}
