"""Ops on an emulated GPU, from the op to the kernel and back, judged as the GPU suite judges a real one."""

from collections.abc import Callable

import pytest
import torch

from fuseline.benchmarks.gpu import correctness
from fuseline.benchmarks.gpu.cases import TINY, AttentionCase, DenseCase
from fuseline.benchmarks.gpu.correctness import Checks
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
