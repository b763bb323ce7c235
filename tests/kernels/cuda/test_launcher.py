"""Ops on an emulated GPU, from the op to the kernel and back, judged as the GPU suite judges a real one."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fuseline.benchmarks.gpu import correctness
from fuseline.benchmarks.gpu.cases import TINY, AttentionCase, DenseCase
from fuseline.benchmarks.gpu.correctness import Checks
from fuseline.benchmarks.gpu.planning import launched_by
from fuseline.benchmarks.gpu.shapes import EPS, Shape
from fuseline.kernels.cuda.choices import Choice, LaunchTable, Spread
from fuseline.kernels.cuda.head import head_problem
from fuseline.kernels.cuda.layout import MAX_SHARED_BYTES
from fuseline.tests.kernels.cuda.emulated_gpu import LEAST, EmulatedLibrary, emulated_gpu

__all__ = ["emulated_gpu"]  # a fixture

CPU = torch.device("cpu")
MANY = DenseCase("many", LEAST, 130, bias=True)
CONTEXTS = tuple(1 + i % 37 for i in range(65))


@pytest.mark.parametrize(
    ("check", "launches"),
    [
        (lambda checks: correctness.check_mlp(MANY, CPU, checks), [64, 64, 2] * 2 + [1]),
        (lambda checks: correctness.check_head(MANY, CPU, checks), [64, 64, 2] * 4),
        (
            lambda checks: correctness.check_attention(AttentionCase("many", LEAST, CONTEXTS), CPU, checks),
            [64, 1] * 2 + [1, 1],
        ),
    ],
    ids=["mlp", "head", "attention"],
)
def test_more_tokens_than_a_launch_takes_are_cut(
    check: Callable[[Checks], None], launches: list[int], emulated_gpu: EmulatedLibrary
) -> None:
    checks = Checks()
    check(checks)
    assert checks.wrong == []
    assert emulated_gpu.batches == launches


@pytest.mark.parametrize(
    ("shape", "cluster", "clusters", "batches"),
    [
        # 48 rows are listed by more warps of a cluster of 8 than 64.
        (replace(LEAST, hidden=256), 8, {64: 1}, [48]),
        # More clusters than the launch before needs more memory.
        (LEAST, 2, {8: 1, 64: 2}, [3, 33]),
    ],
    ids=["fewer rows", "more clusters"],
)
def test_no_launch_of_candidates_has_too_little_scratch_memory(
    shape: Shape, cluster: int, clusters: dict[int, int], batches: list[int], emulated_gpu: EmulatedLibrary
) -> None:
    head = head_problem(emulated_gpu, shape.hidden, shape.vocab, 1, EPS)
    spreads = tuple(Spread(batch, count, 2, MAX_SHARED_BYTES) for batch, count in clusters.items())
    checks = Checks()
    with launched_by(LaunchTable.of([Choice(head.name, head.phases, cluster, spreads)])):
        for batch in batches:
            correctness.check_head(DenseCase("scratch", shape, batch), CPU, checks)
    assert checks.wrong == []
    assert emulated_gpu.shapes == {(cluster, count, 2) for count in clusters.values()}


@pytest.mark.parametrize("cluster", [1, 2])
def test_every_cluster_size_can_be_asked_for(cluster: int, emulated_gpu: EmulatedLibrary) -> None:
    checks = Checks()
    correctness.check_clusters(cluster, TINY, CPU, checks)
    assert checks.wrong == []
    assert emulated_gpu.batches


def test_a_cluster_size_that_does_not_fit_is_told(emulated_gpu: EmulatedLibrary) -> None:
    checks = Checks()
    correctness.check_clusters(8, LEAST, CPU, checks)
    assert "mlp, clusters of 8: clusters of 2 are taken" in checks.wrong
