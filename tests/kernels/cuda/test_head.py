"""The head under the emulator: logits against float64, candidates against the logits."""

from __future__ import annotations

import ctypes
from itertools import product

import numpy as np
import pytest
import torch

from fuseline.benchmarks.gpu.shapes import SHAPES, Shape
from fuseline.kernels.cuda.header import read_headers
from fuseline.kernels.packed import pack
from fuseline.tests.kernels.cuda.emulation import CUDA, Array, Emulation, aligned, build_kernels, from_bf16, to_bf16

HEADER = read_headers(CUDA / "api.h")
EPS = 1e-5


def draw(vocab: int, hidden: int) -> tuple[Array, Array]:
    """Norm and weight, bf16; some rows are equal, so that candidates tie."""
    rng = np.random.default_rng(vocab)
    weight = to_bf16((rng.standard_normal((vocab, hidden)) * hidden**-0.5).astype(np.float32))
    weight[vocab // 2 : vocab // 2 + 20] = weight[:20]
    return to_bf16(rng.uniform(0.5, 1.5, hidden).astype(np.float32)), weight


def run(
    norm: Array,
    weight: Array,
    residual: Array,
    delta: Array | None,
    *,
    rows: list[int] | None = None,
    num_candidates: int = 0,
    logits: bool = True,
    seed: int = 0,
    cluster: int = 2,
    num_clusters: int = 2,
    stages: int = 2,
    repeats: int = 1,
) -> tuple[Array, Array, Array]:
    """Logits, and the candidates' logits and rows."""
    library = build_kernels("emulated-head", CUDA / "head.cu")
    vocab, hidden = weight.shape
    batch = len(residual if rows is None else rows)
    emulation = Emulation(library, seed)
    out, out_address = emulation.output("logits", (batch, vocab))
    best, best_address = emulation.output("candidate_logits", (batch, num_candidates))
    found, found_address = emulation.output("candidate_rows", (batch, num_candidates), np.int32)
    packed = pack(torch.from_numpy(weight.view(np.int16))).numpy().view(np.uint16)
    args = HEADER.structs["fl_head_args"](
        version=HEADER.constants["FL_CUDA_API"],
        batch=batch,
        hidden=hidden,
        vocab=vocab,
        num_candidates=num_candidates,
        eps=EPS,
        launch=HEADER.structs["fl_launch"](cluster=cluster, num_clusters=num_clusters, stages=stages, dependent=1),
        residual=emulation.input("residual", residual),
        delta=emulation.input("delta", delta) if delta is not None else None,
        rows=emulation.input("rows", np.array(rows, np.int64)) if rows is not None else None,
        norm=emulation.input("norm", norm),
        weight=emulation.input("weight", packed),
        logits=out_address if logits else None,
        candidate_logits=best_address,
        candidate_rows=found_address,
    )
    functions = ctypes.CDLL(str(library))
    functions.fl_cuda_head_workspace.restype = ctypes.c_int64
    workspace = aligned((functions.fl_cuda_head_workspace(ctypes.byref(args)),), np.uint8)
    workspace[...] = 0
    args.workspace = emulation.buffer("workspace", workspace, writable=True)
    for _ in range(repeats):
        assert functions.fl_cuda_head(ctypes.byref(args)) == 0
    emulation.run()
    return out, best, found


def expect_best(logits: Array, best: Array, found: Array) -> None:
    """Candidates are the first of the logits by value, equal ones by row."""
    order = np.lexsort((np.broadcast_to(np.arange(logits.shape[1]), logits.shape), -logits))
    np.testing.assert_array_equal(found, order[:, : found.shape[1]])
    np.testing.assert_array_equal(best, np.take_along_axis(logits, found.astype(np.int64), 1))


@pytest.mark.parametrize(
    ("batch", "vocab", "hidden", "cluster", "num_clusters", "num_candidates"),
    [
        (1, 1000, 128, 4, 2, 1),
        (3, 777, 128, 1, 2, 20),
        (9, 640, 64, 2, 2, 5),
        (8, 500, 256, 8, 1, 0),
        (33, 300, 64, 2, 1, 2),
    ],
)
def test_logits_match_float64_and_candidates_the_logits(
    batch: int, vocab: int, hidden: int, cluster: int, num_clusters: int, num_candidates: int
) -> None:
    norm, weight = draw(vocab, hidden)
    rng = np.random.default_rng(batch)
    residual, delta = (rng.standard_normal((batch, hidden)).astype(np.float32) for _ in range(2))
    logits, best, found = run(
        norm,
        weight,
        residual,
        delta,
        seed=batch,
        cluster=cluster,
        num_clusters=num_clusters,
        num_candidates=num_candidates,
    )
    h = residual.astype(np.float64) + delta
    normed = h / np.sqrt((h**2).mean(-1, keepdims=True) + EPS) * from_bf16(norm)
    expected = normed @ from_bf16(weight).astype(np.float64).T
    assert np.linalg.norm(logits - expected) < 5e-3 * np.linalg.norm(expected)
    expect_best(logits, best, found)


@pytest.mark.parametrize("seed", range(3))
def test_candidates_need_no_logits_and_rows_are_chosen(seed: int) -> None:
    norm, weight = draw(400, 64)
    residual = np.random.default_rng(1).standard_normal((12, 64)).astype(np.float32)
    rows = [7, 0, 11]
    logits, *_ = run(norm, weight, residual[rows], None)
    out, best, found = run(
        norm, weight, residual, None, rows=rows, num_candidates=4, logits=False, seed=seed, num_clusters=3, repeats=2
    )
    assert np.isnan(out).all(), "nobody asked for logits"
    expect_best(logits, best, found)


def test_logits_of_a_row_do_not_depend_on_the_batch() -> None:
    norm, weight = draw(300, 128)
    residual = np.random.default_rng(2).standard_normal((17, 128)).astype(np.float32)
    together, *_ = run(norm, weight, residual, None)
    for row in (0, 8, 16):
        alone, *_ = run(norm, weight, residual[[row]], None, seed=row, num_clusters=3)
        np.testing.assert_array_equal(alone[0], together[row])


@pytest.mark.parametrize("num_candidates", [0, 1, 20])
@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
def test_the_workspace_of_a_batch_is_enough_for_smaller_ones(cluster: int, num_candidates: int) -> None:
    functions = ctypes.CDLL(str(build_kernels("emulated-head", CUDA / "head.cu")))
    functions.fl_cuda_head_workspace.restype = ctypes.c_int64
    for vocab, num_clusters in product((90, 4000, 32000, 151936), (1, 2, 11, 32)):
        args = HEADER.structs["fl_head_args"](
            version=HEADER.constants["FL_CUDA_API"],
            hidden=5120,
            vocab=vocab,
            num_candidates=num_candidates,
            launch=HEADER.structs["fl_launch"](cluster=cluster, num_clusters=num_clusters, stages=2),
        )
        sizes = []
        for args.batch in range(1, 65):
            sizes.append(functions.fl_cuda_head_workspace(ctypes.byref(args)))
        assert sizes == sorted(sizes), (vocab, num_clusters)


@pytest.mark.parametrize("cluster", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_no_more_clusters_are_allowed_than_are_taken(shape: Shape, cluster: int) -> None:
    """Two CTAs fit a multiprocessor, 264 in all, which are more than a merge takes lists."""
    functions = ctypes.CDLL(str(build_kernels("emulated-head", CUDA / "head.cu")))
    limits = HEADER.structs["fl_limits"]()

    def ask(num_clusters: int) -> int:
        args = HEADER.structs["fl_head_args"](
            version=HEADER.constants["FL_CUDA_API"],
            batch=1,
            hidden=shape.hidden,
            vocab=shape.vocab,
            launch=HEADER.structs["fl_launch"](cluster=cluster, num_clusters=num_clusters, stages=3),
        )
        error: int = functions.fl_cuda_head_limits(ctypes.byref(args), ctypes.byref(limits))
        return error

    assert ask(1) == 0
    allowed = limits.max_clusters
    assert allowed * cluster == 256
    assert ask(allowed) == 0
    assert ask(allowed + 1) != 0
