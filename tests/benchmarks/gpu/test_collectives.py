"""What the suite measures of collectives, on an emulated GPU: every form's results, and what is made of the times."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fuseline.benchmarks.gpu import collectives
from fuseline.benchmarks.gpu.collectives import Collective
from fuseline.benchmarks.gpu.device import CpuDevice
from fuseline.kernels.cuda.library import CudaLibrary
from fuseline.tests.kernels.cuda.emulated_gpu import EmulatedLibrary


class EmulatedCollectives(EmulatedLibrary):
    """Runs every launch of a collective before it returns."""

    num_launches = 0

    def launch(self, name: str, *arguments: Any) -> None:
        self.num_launches += 1
        self.begin(self.num_launches)
        args = arguments[0]._obj
        num_bytes = 4 * args.num_clusters * args.cluster * args.elements
        gathers = args.kind == self.header.constants["FL_GATHER"]
        self.emulation.memory("input", args.input, num_bytes, writable=False)
        self.emulation.memory("output", args.output, num_bytes * (args.cluster if gathers else 1), writable=True)
        workspace_bytes = self.call("fl_cuda_collective_workspace", *arguments)
        self.emulation.memory("workspace", args.workspace, workspace_bytes, writable=True)
        CudaLibrary.launch(self, name, *arguments)
        self.emulation.run()


@pytest.mark.parametrize(
    ("kind", "forms"), [("reduce", ["one shot", "log2", "scatter", "off chip"]), ("gather", ["one shot", "off chip"])]
)
def test_every_form_is_measured_and_right(kind: str, forms: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(collectives, "REPEATS", 2)
    figure = collectives.measure(EmulatedCollectives(), CpuDevice(), kind, 2, 64)
    assert (list(figure.us), list(figure.launched_us), figure.wrong) == (forms, forms, [])


@pytest.mark.parametrize(("cluster", "elements", "of_target"), [(4, 512, True), (4, 64, False), (8, 512, False)])
def test_the_best_form_on_the_chip_is_compared_with_the_way_off_it(
    cluster: int, elements: int, of_target: bool
) -> None:
    us = {"one shot": 4.0, "scatter": 2.0, "off chip": 7.0}
    launched_us = {"one shot": 8.0, "scatter": 10.0, "off chip": 12.0}
    figure = Collective("reduce", cluster, 32, elements, us, launched_us, [])
    found = figure.record()
    assert (found["speedup"], found["launched_speedup"], found["of_target"]) == (3.5, 1.5, of_target)
    del us["off chip"], launched_us["off chip"]  # it cannot run where not all CTAs are resident
    found = figure.record()
    assert (found["speedup"], found["launched_speedup"], found["of_target"]) == (None, None, False)
