"""Tables of measured launches: written, read, found by shape and batch, and used where the device can."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from fuseline.kernels.cuda import launch
from fuseline.kernels.cuda.choices import Choice, LaunchTable, Spread, default_table, read_table
from fuseline.kernels.cuda.launch import Problem
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


@pytest.mark.parametrize("text", ["", "{", '[{"block": "mlp"}]', '[{"block": "mlp", "weights": 3}]', "[3]"])
def test_what_is_no_table_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "launches.json"
    path.write_text(text)
    with pytest.raises(LaunchError, match="no table"):
        read_table(path)
    with pytest.raises(LaunchError, match="no table"):
        read_table(tmp_path / "none.json")


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
