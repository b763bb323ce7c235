"""Collectives within a cluster against the same through global memory, and what the path between SMs can do."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch

from fuseline.kernels.cuda.library import CudaLibrary
from fuseline.kernels.errors import LaunchError

from .device import Device

Tensor = torch.Tensor
KINDS = {"reduce": "FL_SUM", "gather": "FL_GATHER"}
FORMS = {"one shot": "FL_ONE_SHOT", "log2": "FL_LOG2", "scatter": "FL_SCATTER", "off chip": "FL_OFF_CHIP"}
CLUSTERS = (2, 4, 8, 16)
ELEMENTS = (64, 512, 2048)
NUM_CLUSTERS = 32
REPEATS = 64
# 256 KB in all, as in the paper: 32 clusters of 8 KB.
TARGET = (4, 512)
CHASE_REPEATS = 2000
BUFFER_BYTES = 32768
STREAM_REPEATS = 200


@dataclass(frozen=True, slots=True)
class Collective:
    """One kind, cluster size and vector length.

    Attributes:
        elements: float32, of one CTA's vector.
        us: by form, one collective among many in one kernel.
        launched_us: by form, a kernel that does one, its launch included.
        wrong: forms whose results are.
    """

    kind: str
    cluster: int
    num_clusters: int
    elements: int
    us: dict[str, float]
    launched_us: dict[str, float]
    wrong: list[str]

    def record(self) -> dict[str, object]:
        """For the results file; ``speedup`` is the best form's over off-chip."""
        on_chip = [us for form, us in self.us.items() if form != "off chip"]
        launched = [us for form, us in self.launched_us.items() if form != "off chip"]
        of_target = (self.cluster, self.elements) == TARGET
        speedup = self.us["off chip"] / min(on_chip) if on_chip and "off chip" in self.us else None
        launched_speedup = self.launched_us["off chip"] / min(launched) if speedup is not None else None
        return {
            **asdict(self),
            "of_target": of_target and speedup is not None,
            "speedup": speedup,
            "launched_speedup": launched_speedup,
        }


def measure(library: CudaLibrary, device: Device, kind: str, cluster: int, elements: int) -> Collective:
    """All forms that the kernels have of a collective; those that cannot run here are left out."""
    resident = _resident(library, kind, cluster, elements)
    num_clusters = min(NUM_CLUSTERS, resident)
    found = Collective(kind, cluster, num_clusters, elements, {}, {}, [])
    generator = torch.Generator(device.torch).manual_seed(cluster)
    values = torch.empty(num_clusters, cluster, elements, device=device.torch)
    values.normal_(generator=generator)
    expected = expected_result(values, kind)
    for form, constant in FORMS.items():
        results = torch.full_like(expected, float("nan"))
        run = partial(_run, library, kind, constant, values, results)
        try:
            run(1)
        except LaunchError:
            continue
        if not torch.allclose(results, expected, rtol=1e-5, atol=1e-5):
            found.wrong.append(form)
        found.launched_us[form] = device.time([partial(run, 1)]).us
        many = device.time([partial(run, 1 + REPEATS)]).us
        found.us[form] = (many - found.launched_us[form]) / REPEATS
    return found


def expected_result(values: Tensor, kind: str) -> Tensor:
    """[clusters, cluster, ...]: every CTA gets the sum of its cluster's vectors, or all of them."""
    clusters, cluster, elements = values.shape
    if kind == "gather":
        return values.view(clusters, 1, cluster * elements).expand(-1, cluster, -1).contiguous()
    total = values[:, 0].clone()
    for rank in range(1, cluster):  # in rank order, as the kernels do
        total += values[:, rank]
    return total[:, None].expand(-1, cluster, -1).contiguous()


def _arguments(
    library: CudaLibrary, kind: str, form: str, cluster: int, num_clusters: int, elements: int, repeats: int
) -> ctypes.Structure:
    constants = library.header.constants
    return library.arguments(
        "fl_collective_args",
        kind=constants[KINDS[kind]],
        form=constants[form],
        cluster=cluster,
        num_clusters=num_clusters,
        elements=elements,
        repeats=repeats,
    )


def _resident(library: CudaLibrary, kind: str, cluster: int, elements: int) -> int:
    """Clusters of all forms that run at once; a form that cannot run at all does not count."""
    fitting = []
    for form in FORMS.values():
        args = _arguments(library, kind, form, cluster, 1, elements, 1)
        limits = library.header.structs["fl_limits"]()
        if library.call("fl_cuda_collective_limits", ctypes.byref(args), ctypes.byref(limits)) == 0:
            fitting.append(int(limits.max_clusters))
    return max(1, min(fitting, default=1))


def _run(library: CudaLibrary, kind: str, form: str, values: Tensor, results: Tensor, repeats: int) -> None:
    num_clusters, cluster, elements = values.shape
    args = _arguments(library, kind, form, cluster, num_clusters, elements, repeats)
    num_bytes = library.call("fl_cuda_collective_workspace", ctypes.byref(args))
    workspace = _workspace(num_clusters, num_bytes, values.device)
    args.input, args.output, args.workspace = values.data_ptr(), results.data_ptr(), workspace.data_ptr()
    args.stream = torch.cuda.current_stream(values.device).cuda_stream
    library.launch("fl_cuda_collective", ctypes.byref(args))


_workspaces: dict[tuple[int, int, torch.device], Tensor] = {}


def _workspace(num_clusters: int, num_bytes: int, device: torch.device) -> Tensor:
    """Zeroed once and kept, as a captured graph needs it; it begins with a counter for each cluster."""
    key = (num_clusters, num_bytes, device)
    if key not in _workspaces:
        _workspaces[key] = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    return _workspaces[key]


def distributed_memory(library: CudaLibrary, device: Device, cluster: int) -> dict[str, float]:
    """Cycles of one load from the next CTA's shared memory, and bytes per cycle and second by loads and by copies."""
    num_clusters = 128 // cluster
    found: dict[str, float] = {"cluster": cluster}
    ticks = torch.zeros(num_clusters * cluster, dtype=torch.int64, device=device.torch)
    run: Callable[[str, int], None] = partial(_run_dsmem, library, cluster, num_clusters, ticks)
    run("FL_DSMEM_LATENCY", CHASE_REPEATS)
    torch.cuda.synchronize(device.torch)
    found["latency_cycles"] = ticks.double().median().item() / CHASE_REPEATS
    total_bytes = num_clusters * cluster * BUFFER_BYTES * STREAM_REPEATS
    for mode in ("FL_DSMEM_LOADS", "FL_DSMEM_COPIES"):
        few = device.time([partial(run, mode, 1)]).us
        many = device.time([partial(run, mode, 1 + STREAM_REPEATS)]).us
        name = mode.rpartition("_")[2].lower()
        found[f"{name}_bytes_per_s"] = total_bytes / (many - few) * 1e6
        torch.cuda.synchronize(device.torch)
        found[f"{name}_bytes_per_cycle"] = BUFFER_BYTES * (1 + STREAM_REPEATS) / ticks.double().median().item()
    return found


def _run_dsmem(library: CudaLibrary, cluster: int, num_clusters: int, ticks: Tensor, mode: str, repeats: int) -> None:
    args = library.arguments(
        "fl_dsmem_args",
        cluster=cluster,
        num_clusters=num_clusters,
        mode=library.header.constants[mode],
        bytes=BUFFER_BYTES,
        repeats=repeats,
    )
    args.ticks, args.stream = ticks.data_ptr(), torch.cuda.current_stream(ticks.device).cuda_stream
    library.launch("fl_cuda_dsmem", ctypes.byref(args))
