"""The parts of the suite: each takes a ``Run`` and returns what goes into the results under its name."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fuseline.kernels.cuda.attention import attention_problem
from fuseline.kernels.cuda.head import head_problem
from fuseline.kernels.cuda.launch import plan_launch
from fuseline.kernels.cuda.library import CudaLibrary, load_library
from fuseline.kernels.cuda.mlp import mlp_problem
from fuseline.kernels.errors import LaunchError

from . import baselines, collectives, correctness, public, report
from .blocks import BLOCK_SIZE, EPS, Bench
from .cases import TINY
from .device import Device
from .shapes import BATCHES, CONTEXTS, SHAPES

SANITIZER_LIMIT_S = 120
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


@dataclass
class Run:
    """What the parts share.

    Attributes:
        tiny: shapes that a CPU can afford.
        clusterfusion: a checkout of the public kernels.
        wrong: every wrong result found so far, in words.
    """

    device: Device
    tiny: bool
    clusterfusion: Path | None = None
    wrong: list[str] = field(default_factory=list)

    @cached_property
    def bytes_per_s(self) -> float:
        """The copy bandwidth of this run."""
        return self.device.copy_bytes_per_s()


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
    if not run.tiny:
        found["library"] = str(load_library().path.name)  # without it nothing below would be about the kernels
        found["launches"] = launches(load_library())
        header = ("shape", "block", "batch", "cluster", "clusters", "resident", "stages")
        print(report.table(header, [list(row.values()) for row in found["launches"]]))
    print(f"{found['device']['name']}: copies {run.bytes_per_s / 1e12:.2f} TB/s, torch {torch.__version__}")
    return found


def launches(library: CudaLibrary) -> list[dict[str, Any]]:
    """How each block is spread over this GPU, and how many of its clusters cudaOccupancyMaxActiveClusters allows."""
    rows = []
    for shape in SHAPES:
        cache = (2, 65536, shape.kv_heads, BLOCK_SIZE, shape.head_dim)
        width = max(CONTEXTS) // BLOCK_SIZE
        for problem in (
            mlp_problem(library, shape.hidden, shape.inner, EPS),
            attention_problem(library, shape.hidden, shape.heads, cache, width, scale=1.0, eps=EPS, window=0),
            head_problem(library, shape.hidden, shape.vocab, 0, EPS),
        ):
            for batch in BATCHES:
                plan = plan_launch(library, problem, batch)
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


def check(run: Run) -> dict[str, Any]:
    """Every op on its edges."""
    checks = correctness.check_all(run.device.torch, tiny=run.tiny)
    run.wrong += checks.wrong
    print(f"{checks.num_checked} checks, {len(checks.wrong)} wrong")
    return {"num_checked": checks.num_checked, "wrong": checks.wrong}


def sanitize(run: Run) -> dict[str, Any]:
    """compute-sanitizer's tools over one small run of every op; what is found counts as wrong."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None or run.tiny:
        print("skipped: no compute-sanitizer")
        return {"skipped": "no compute-sanitizer"}
    found = {}
    for name in TOOLS:
        command = [tool, "--tool", name, "--error-exitcode", "7", sys.executable, "-m", "benchmarks.gpu.sanitized"]
        found[name] = _sanitize_with(command)
        print(f"{name}: {found[name]}")
        if found[name] == "errors":
            run.wrong.append(f"compute-sanitizer: {name} found errors")
    return found


def _sanitize_with(command: list[str]) -> str:
    environment = {**os.environ, "FUSELINE_CUDA_LIBRARY": str(load_library().path)}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=SANITIZER_LIMIT_S,
            cwd=report.ROOT,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"not done in {SANITIZER_LIMIT_S} s"
    if done.returncode == 7:
        print(done.stdout[-4000:])
        return "errors"
    return "clean" if done.returncode == 0 else f"did not run: {done.stderr[-300:]}"


def blocks(run: Run) -> list[dict[str, Any]]:
    """Every block and the layer, at every shape, batch and context."""
    pieces = baselines.elementwise(run.device.torch)
    extension = None if run.clusterfusion is None else public.load(run.clusterfusion)
    shapes, batches, contexts = ((TINY,), (1, 2), (32,)) if run.tiny else (SHAPES, BATCHES, CONTEXTS)
    figures: list[dict[str, Any]] = []
    for shape in shapes:
        bench = Bench(shape, run.device, run.bytes_per_s, pieces, extension)
        for batch in batches:
            found = [bench.mlp(batch), bench.head(batch)]
            for context in contexts:
                found += bench.attention(batch, context)
            figures += [figure.record() for figure in found]
        print(report.table(report.BLOCK_HEADER, report.block_rows(figures[-len(found) * len(batches) :])), flush=True)
    return figures


def on_chip(run: Run) -> list[dict[str, Any]]:
    """Latency and bandwidth between the SMs of a cluster, for each cluster size."""
    if run.tiny:
        return []
    found = []
    for cluster in collectives.CLUSTERS:
        try:
            found.append(collectives.distributed_memory(load_library(), run.device, cluster))
        except LaunchError as error:
            print(f"clusters of {cluster}: {error}")
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
                figure = collectives.measure(load_library(), run.device, kind, cluster, elements)
                run.wrong += [f"{kind} of {cluster} CTAs, {elements} elements: {form}" for form in figure.wrong]
                found.append(figure.record())
                each = [figure.us.get(form, "-") for form in collectives.FORMS]
                rows.append([kind, cluster, elements, *each, found[-1]["speedup"] or "-"])
    print(report.table(("us", "cluster", "elements", *collectives.FORMS, "x faster"), rows))
    return found


Part = Callable[[Run], Any]
PARTS: dict[str, Part] = {
    "environment": environment,
    "correctness": check,
    "dsmem": on_chip,
    "collectives": reduce_gather,
    "blocks": blocks,
    "sanitize": sanitize,
}
