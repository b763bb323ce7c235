"""The collectives of cluster.cuh and their off-chip twins, under the emulator, against float64."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from fuseline.kernels.cuda.header import read_headers
from fuseline.tests.kernels.cuda.emulation import CUDA, Array, Emulation, aligned, build_kernels

HEADER = read_headers(CUDA / "api.h")
SUM, MAX, GATHER, ONE_SHOT, LOG2, OFF_CHIP, SCATTER = (
    HEADER.constants[f"FL_{name}"] for name in ["SUM", "MAX", "GATHER", "ONE_SHOT", "LOG2", "OFF_CHIP", "SCATTER"]
)


def library() -> Any:
    functions = ctypes.CDLL(str(build_kernels("emulated-collective", CUDA / "collective.cu")))
    functions.fl_cuda_collective_workspace.restype = ctypes.c_int64
    return functions


def run(kind: int, form: int, cluster: int, values: Array, *, repeats: int, seed: int) -> Array:
    """Output of a collective over values [clusters, cluster, elements]."""
    functions = library()
    num_clusters, _, elements = values.shape
    emulation = Emulation(build_kernels("emulated-collective", CUDA / "collective.cu"), seed)
    shape = (*values.shape[:2], elements * (cluster if kind == GATHER else 1))
    output, address = emulation.output("output", shape)
    args = HEADER.structs["fl_collective_args"](
        version=HEADER.constants["FL_CUDA_API"],
        kind=kind,
        form=form,
        cluster=cluster,
        num_clusters=num_clusters,
        elements=elements,
        repeats=repeats,
        input=emulation.input("input", values),
        output=address,
    )
    workspace = aligned((functions.fl_cuda_collective_workspace(ctypes.byref(args)),), np.uint8)
    workspace[...] = 0
    args.workspace = emulation.buffer("workspace", workspace, writable=True)
    assert functions.fl_cuda_collective(ctypes.byref(args)) == 0
    emulation.run()
    return output


def draw(num_clusters: int, cluster: int, elements: int) -> Array:
    values: Array = np.random.default_rng(elements).standard_normal((num_clusters, cluster, elements))
    return values.astype(np.float32)


def expect_near(kind: int, output: Array, values: Array, repeats: int = 1) -> None:
    """Every CTA of a cluster has the same, and what float64 makes of it; nothing is rounded but sums."""
    cluster = values.shape[1]
    wide = values.astype(np.float64)
    if kind == SUM:
        grown, rounding = cluster ** (repeats - 1), 1e-5
        expected = wide.sum(1, keepdims=True) * grown
    else:
        grown, rounding = 1, 0.0
        expected = wide.max(1, keepdims=True) if kind == MAX else wide.reshape(len(values), 1, -1)
    np.testing.assert_allclose(output, np.repeat(expected, cluster, axis=1), rtol=rounding, atol=rounding * grown)
    assert (output == output[:, :1]).all(), "CTAs of a cluster differ"


FORMS = [(SUM, ONE_SHOT), (SUM, LOG2), (SUM, SCATTER), (SUM, OFF_CHIP), (MAX, ONE_SHOT), (GATHER, ONE_SHOT)]


@pytest.mark.parametrize("cluster", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(("kind", "form"), [*FORMS, (MAX, SCATTER), (GATHER, OFF_CHIP)])
def test_equals_float64_for_every_cluster_size(kind: int, form: int, cluster: int) -> None:
    values = draw(1 if cluster > 4 else 2, cluster, 128)
    output = run(kind, form, cluster, values, repeats=1, seed=cluster)
    expect_near(kind, output, values)


@pytest.mark.parametrize(("cluster", "elements"), [(2, 1024 + 64), (4, 1024 + 64), (2, 64)])
@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_many_in_a_row_give_the_same_bits_in_any_order(kind: int, form: int, cluster: int, elements: int) -> None:
    """Also where many threads have no elements, and nobody waits for them."""
    values = draw(1, cluster, elements)
    outputs = [run(kind, form, cluster, values, repeats=5, seed=seed) for seed in range(6)]
    for output in outputs[1:]:
        np.testing.assert_array_equal(output, outputs[0])
    expect_near(kind, outputs[0], values, repeats=5)


@pytest.mark.parametrize("mode", ["LATENCY", "LOADS", "COPIES"])
def test_reads_and_copies_of_a_peer_keep_the_rules(mode: str) -> None:
    functions = library()
    emulation = Emulation(build_kernels("emulated-collective", CUDA / "collective.cu"), seed=1)
    ticks, address = emulation.output("ticks", (8,), np.int64)
    args = HEADER.structs["fl_dsmem_args"](
        version=HEADER.constants["FL_CUDA_API"],
        cluster=4,
        num_clusters=2,
        mode=HEADER.constants[f"FL_DSMEM_{mode}"],
        bytes=8192 + 256,
        repeats=3,
        ticks=address,
    )
    assert functions.fl_cuda_dsmem(ctypes.byref(args)) == 0
    emulation.run()
    assert (ticks > 0).all()


def test_refuses_what_no_form_does() -> None:
    args = HEADER.structs["fl_collective_args"](
        version=HEADER.constants["FL_CUDA_API"], cluster=4, num_clusters=1, elements=64, repeats=1
    )
    for field, value in {"version": 0, "cluster": 3, "elements": 6, "form": 9, "kind": 7, "num_clusters": 0}.items():
        wrong = type(args).from_buffer_copy(args)
        setattr(wrong, field, value)
        assert library().fl_cuda_collective(ctypes.byref(wrong)) != 0, field
