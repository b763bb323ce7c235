"""How launches are chosen, with the compiled library's own account of shared memory; no driver is asked."""

import pytest

from fuseline.benchmarks.gpu.planning import problems
from fuseline.benchmarks.gpu.shapes import SHAPES, Shape
from fuseline.kernels.cuda import launch
from fuseline.kernels.cuda.head import head_problem
from fuseline.kernels.cuda.layout import MAX_SHARED_BYTES, tiles
from fuseline.kernels.cuda.library import CudaLibrary

pytestmark = pytest.mark.timeout(900)  # the first test compiles all kernels


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_every_block_fits_at_one_cluster_size_for_every_batch(cuda_library: CudaLibrary, shape: Shape) -> None:
    for problem in problems(cuda_library, shape):
        cluster, max_batch = launch.choose_cluster(cuda_library, problem)
        assert max_batch >= 16, problem.name
        for batch in (1, 3, max_batch):
            stages = launch.most_stages(cuda_library, problem, batch, cluster, MAX_SHARED_BYTES)
            assert stages >= launch.MIN_STAGES
            needed = launch.shared_bytes(cuda_library, problem, batch, cluster, stages)
            assert 0 < needed <= MAX_SHARED_BYTES


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_every_block_keeps_its_budget_of_shared_memory(cuda_library: CudaLibrary, shape: Shape) -> None:
    budgets = {"mlp": "MLP", "attention": "ATTN", "head": "HEAD"}
    for problem in problems(cuda_library, shape):
        budget = tiles()[f"{budgets[problem.name]}_MAX_SHARED_BYTES"]
        cluster, _ = launch.choose_cluster(cuda_library, problem)
        for batch in (1, 8):
            needed = launch.shared_bytes(cuda_library, problem, batch, cluster, launch.MIN_STAGES, budget)
            assert needed <= budget, (problem.name, batch)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_candidates_are_launched_as_logits_are(cuda_library: CudaLibrary, shape: Shape) -> None:
    """So that they have the bits of the logits."""
    logits, candidates = (head_problem(cuda_library, shape.hidden, shape.vocab, count, 1e-6) for count in (0, 20))
    assert launch.choose_cluster(cuda_library, candidates) == launch.choose_cluster(cuda_library, logits)
    for batch in (1, 64):
        stages = [launch.most_stages(cuda_library, of, batch, 4, MAX_SHARED_BYTES) for of in (logits, candidates)]
        assert stages[0] == stages[1] >= launch.MIN_STAGES


def test_clusters_are_taken_that_divide_the_work() -> None:
    """Fifteen clusters fit but eleven are done sooner: 256 units are then three a warp, not two or three."""
    phases = ((28672, 4096), (4096, 14336))
    predicted = {count: launch.predicted_s(phases, count, 8, 3) for count in (11, 15, 16)}
    assert predicted[16] < predicted[11] < predicted[15]
    floor = sum(2 * rows * cols for rows, cols in phases) / launch.BYTES_PER_S
    assert floor <= predicted[16] < 1.05 * floor
