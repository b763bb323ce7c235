"""Which launches are tried, and which of them end up in the table."""

from pathlib import Path

import pytest

from fuseline.benchmarks.gpu import baselines, parts, tune
from fuseline.benchmarks.gpu.blocks import Bench
from fuseline.benchmarks.gpu.device import CpuDevice
from fuseline.benchmarks.gpu.tune import Task, Trial
from fuseline.kernels.cuda import launch
from fuseline.kernels.cuda.choices import Spread
from fuseline.kernels.cuda.launch import HALF_SHARED_BYTES, Problem
from fuseline.kernels.cuda.layout import MAX_SHARED_BYTES
from fuseline.tests.kernels.cuda.emulated_gpu import LEAST, EmulatedLibrary, emulated_gpu

__all__ = ["emulated_gpu"]  # a fixture

WEIGHTS = ((28672, 4096), (4096, 14336))
PROBLEM = Problem("mlp", "fl_cuda_mlp_block", (), WEIGHTS, None)  # type: ignore[arg-type]


def trial(batch: int, cluster: int, stages: int, us: float) -> Trial:
    return Trial(Task("shape", PROBLEM, batch, 80.0, ()), cluster, Spread(batch, 16, stages, 1000), us, 0.1)


def test_the_cluster_size_is_best_over_all_batches_and_launches_are_best_for_each() -> None:
    trials = [
        trial(1, 4, 5, 100.0),
        trial(1, 4, 6, 90.0),
        trial(16, 4, 5, 100.0),
        trial(1, 8, 5, 95.0),
        trial(16, 8, 4, 91.0),
        trial(16, 8, 3, 93.0),
        trial(1, 2, 5, 10.0),  # but not for batches of 16
    ]
    (choice,) = tune.best_table(trials).choices.values()
    assert choice.cluster == 8
    assert [(spread.batch, spread.stages) for spread in choice.launches] == [(1, 5), (16, 4)]
    assert trials[0].record()["over_floor"] == 1.25


def test_launches_to_try_fit_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    def resident(*arguments: object) -> int:
        return 33 if arguments[-1] == MAX_SHARED_BYTES else 66

    monkeypatch.setattr(launch, "most_stages", lambda *arguments: 6 if arguments[-1] == MAX_SHARED_BYTES else 2)
    monkeypatch.setattr(launch, "resident_clusters", resident)
    found = tune.spreads(None, PROBLEM, 1, 4, 132)  # type: ignore[arg-type]
    assert len(found) == len(set(found))
    assert {spread.stages for spread in found} == {1, 2, 4, 6}
    assert {spread.max_shared_bytes for spread in found} == {HALF_SHARED_BYTES, MAX_SHARED_BYTES}
    assert {33, 66} <= {spread.num_clusters for spread in found}
    assert max(spread.num_clusters for spread in found if spread.stages == 6) == 33


def test_launches_are_tried_on_an_emulated_gpu(
    emulated_gpu: EmulatedLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All launches of a cluster size have the same bits, and the best make a table."""
    monkeypatch.setattr(tune, "BATCHES", (2,))
    monkeypatch.setattr(tune, "CONTEXT", 32)
    monkeypatch.setattr(parts, "load_library", lambda: emulated_gpu)
    device = CpuDevice()
    device.l2_bytes, device.multiprocessors = 1, 4
    run = parts.Run(device, tiny=True, path=tmp_path / "found.json")
    bench = Bench(LEAST, device, 1e9, baselines.elementwise(device.torch))
    trials: list[Trial] = []
    for task in tune.tasks(emulated_gpu, bench, LEAST, 1e9):
        trials += parts._tune_cluster(run, task, 2)
    assert (run.wrong, run.failed) == ([], [])
    assert {trial.task.problem.name for trial in trials} == {"mlp", "attention", "head"}
    assert emulated_gpu.shapes == {(2, trial.spread.num_clusters, trial.spread.stages) for trial in trials}
    assert len(tune.best_table(trials).choices) == 3
