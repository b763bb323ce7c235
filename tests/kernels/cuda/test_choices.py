"""Tables of measured launches: written, read, found by shape and batch, and used where the device can."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fuseline.kernels.cuda import fused, launch
from fuseline.kernels.cuda.choices import Choice, LaunchTable, Spread, default_table, read_table
from fuseline.kernels.cuda.launch import Problem
from fuseline.kernels.cuda.launcher import CAPABILITY
from fuseline.kernels.cuda.layout import MAX_SHARED_BYTES
from fuseline.kernels.cuda.library import CudaLibrary
from fuseline.kernels.errors import LaunchError

WEIGHTS = ((28672, 4096), (4096, 14336))
CHOICE = Choice("mlp", WEIGHTS, 8, (Spread(1, 16, 6, 232448), Spread(16, 11, 4, 116736)))
TABLE = LaunchTable.of([CHOICE])


def test_a_table_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "launches.json"
    path.write_text(json.dumps(TABLE.records()))
    assert read_table(path) == TABLE
    default_table.cache_clear()
    try:
        assert default_table() == LaunchTable()
        monkeypatch.setenv("FUSELINE_LAUNCHES", str(path))
        default_table.cache_clear()
        assert default_table() == TABLE
    finally:
        default_table.cache_clear()


def record(**changes: Any) -> str:
    (good,) = TABLE.records()
    return json.dumps([{**good, **changes}])


def spread(**changes: Any) -> str:
    return record(launches=[{**asdict(CHOICE.launches[0]), **changes}])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[3]",
        '[{"block": "mlp"}]',
        record(block=3),
        record(weights=3),
        record(weights=[[4096.0, 4096]]),
        record(weights=[[4096, "4096"]]),
        record(cluster="8"),
        record(cluster=3),
        record(cluster=16),
        record(launches=None),
        spread(stages=0),
        spread(num_clusters=2.5),
        spread(batch=None),
        spread(max_shared_bytes=True),
    ],
)
def test_what_is_no_table_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "launches.json"
    path.write_text(text)
    with pytest.raises(LaunchError, match="no table"):
        read_table(path)
    with pytest.raises(LaunchError, match="no table"):
        read_table(tmp_path / "none.json")


def test_a_table_is_read_where_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: CAPABILITY)
    monkeypatch.setattr(fused, "native_library", object)
    monkeypatch.setenv("FUSELINE_LAUNCHES", str(tmp_path / "none.json"))
    default_table.cache_clear()
    with pytest.raises(LaunchError, match="no table"):
        fused._usable.__wrapped__(torch.device("cuda:0"))
    assert not fused._usable.__wrapped__(torch.device("cpu")), "where no kernel runs, no table matters"


@pytest.mark.parametrize(("batch", "stages"), [(1, 6), (2, 4), (16, 4), (17, None)])
def test_a_batch_takes_the_next_larger_one_s_launch(batch: int, stages: int | None) -> None:
    found = TABLE.find("mlp", WEIGHTS)
    assert found is not None
    spread = found.spread(batch)
    assert (None if spread is None else spread.stages) == stages
    assert TABLE.find("head", WEIGHTS) is None


@pytest.mark.parametrize(
    ("batch", "resident", "expected"),
    [
        (1, 16, (8, 16, 6)),
        (9, 16, (8, 11, 4)),
        (1, 15, (8, 11, 2)),  # not all of them fit: the model chooses, at the same cluster size
        (64, 16, (8, 16, 2)),
    ],
)
def test_a_launch_is_the_table_s_where_it_can_run(
    batch: int, resident: int, expected: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def limits(
        library: CudaLibrary, problem: Problem, batch: int, cluster: int, stages: int, budget: int
    ) -> SimpleNamespace:
        return SimpleNamespace(shared_bytes=50000 * stages, max_clusters=resident)

    monkeypatch.setattr(launch, "_limits", limits)
    problem = Problem("mlp", "fl_cuda_mlp_block", (), WEIGHTS, None)  # type: ignore[arg-type]
    plan = launch.plan_launch(None, problem, batch, TABLE)  # type: ignore[arg-type]
    assert (plan.cluster, plan.num_clusters, plan.stages) == expected
    assert launch.plan_launch(None, problem, batch, LaunchTable()).cluster == launch.CLUSTERS[0]  # type: ignore[arg-type]


def test_a_cluster_size_that_does_not_fit_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    def limits(
        library: CudaLibrary, problem: Problem, batch: int, cluster: int, stages: int, budget: int
    ) -> SimpleNamespace:
        needed = MAX_SHARED_BYTES + 1 if cluster == CHOICE.cluster else 50000
        return SimpleNamespace(shared_bytes=needed, max_clusters=33)

    monkeypatch.setattr(launch, "_limits", limits)
    problem = Problem("mlp", "fl_cuda_mlp_block", (), WEIGHTS, None)  # type: ignore[arg-type]
    for batch in (1, 64):
        plan = launch.plan_launch(None, problem, batch, TABLE)  # type: ignore[arg-type]
        assert plan == launch.plan_launch(None, problem, batch, LaunchTable())  # type: ignore[arg-type]
