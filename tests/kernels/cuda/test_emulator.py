"""The emulator finds what it promises: small kernels pass, and each planted bug is reported as what it is."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from fuseline.tests.kernels.cuda.emulation import Array, Broken, Emulation, aligned, build_kernels, from_bf16, to_bf16

CASES = Path(__file__).parent / "emulator_cases.cu"
BUGS = [
    "none",
    "missing_wait",
    "wrong_parity",
    "no_empty_wait",
    "too_few_bytes",
    "too_many_bytes",
    "odd_size",
    "missing_proxy_fence",
    "missing_cluster_barrier",
    "one_slot",
    "early_exit",
    "missing_sync",
    "out_of_bounds",
    "unwritten",
    "missing_release",
    "missing_global_fence",
    "diverged_warp",
    "missing_arrival",
    "write_read_only",
    "no_grid_wait",
]
KERNELS = ["stream", "pass_around", "push", "exchange", "fetch", "twice", "multiply"]
SEEDS = 12


def run(
    kernel: str, bug: str, seed: int, rounds: int = 6, cluster: int = 4, resident: int = 0
) -> tuple[Array, Array]:
    """Input and output of a kernel."""
    library = build_kernels("emulator-cases", CASES)
    emulation = Emulation(library, seed, resident)
    values = np.random.default_rng(seed).standard_normal(4096).astype(np.float32)
    words = aligned((256,), np.uint32)
    words[...] = 0
    out, out_address = emulation.output("out", (1024,))
    entry = ctypes.CDLL(str(library)).fl_case
    entry.argtypes = [ctypes.c_int] * 4 + [ctypes.c_void_p] * 3
    if kernel == "multiply":
        words[: 24 * 8] = to_bf16(values[: 24 * 16]).view(np.uint32)
    addresses = (emulation.input("in", values), out_address, emulation.buffer("words", words, writable=True))
    assert entry(KERNELS.index(kernel), BUGS.index(bug), rounds, cluster, *addresses) == 0
    emulation.run()
    return values, out


@pytest.mark.parametrize("seed", range(SEEDS))
def test_right_kernels_pass(seed: int) -> None:
    values, out = run("stream", "none", seed)
    np.testing.assert_allclose(out[:256], values[: 6 * 256].reshape(6, 256).sum(0), rtol=1e-5, atol=1e-5)
    for cluster in (2, 4):
        values, out = run("pass_around", "none", seed, rounds=cluster, cluster=cluster)
        np.testing.assert_array_equal(out[: 64 * cluster], values[: 64 * cluster])
        values, out = run("push", "none", seed, rounds=cluster, cluster=cluster)
        np.testing.assert_array_equal(out[: 64 * cluster], values[: 64 * cluster])
    values, out = run("exchange", "none", seed)
    np.testing.assert_allclose(out[:4], np.full(4, values[:32].sum() * 10), rtol=1e-4, atol=1e-4)
    values, out = run("fetch", "none", seed)
    np.testing.assert_array_equal(out[:128], np.tile(values[:32], 4))
    values, out = run("twice", "none", seed, rounds=0)
    np.testing.assert_array_equal(out[:128], np.tile(2 * values[:32], 4))
    values, out = run("twice", "none", seed, rounds=0, resident=2)
    np.testing.assert_array_equal(out[:128], np.tile(2 * values[:32], 4))


def test_matrix_instructions_follow_their_layout() -> None:
    values, out = run("multiply", "none", 0)
    operands = from_bf16(to_bf16(values[: 24 * 16])).reshape(24, 16)
    np.testing.assert_allclose(out[:128].reshape(16, 8), operands[:16] @ operands[16:].T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "bug", "message"),
    [
        ("stream", "missing_wait", "races with the (write|read) of|more arrivals|deadlock"),
        ("stream", "wrong_parity", "races with the (write|read) of|deadlock|more arrivals"),
        ("stream", "no_empty_wait", "copy.*races with the read of|more arrivals"),
        ("stream", "too_few_bytes", "deadlock|races|middle of phase"),
        ("stream", "too_many_bytes", "deadlock"),
        ("stream", "odd_size", "not a multiple of 16"),
        ("stream", "missing_arrival", "deadlock.*an mbarrier"),
        ("pass_around", "missing_proxy_fence", "without its proxy fence"),
        ("pass_around", "missing_cluster_barrier", "not an initialised mbarrier|initialisation it does not know of"),
        (
            "pass_around",
            "early_exit",
            "might have missed|in flight|middle of phase|has ended",
        ),
        ("push", "one_slot", "copy.*races with the read of|same phase|deadlock"),
        ("exchange", "missing_sync", "races with the write of|nobody has written|races with the read"),
        ("exchange", "out_of_bounds", "outside"),
        ("exchange", "unwritten", "nobody has written"),
        ("exchange", "missing_release", "races with the write of|nobody has written"),
        ("exchange", "diverged_warp", "while other lanes of its warp are in"),
        ("exchange", "write_read_only", "read-only"),
        ("fetch", "missing_global_fence", "without its proxy fence"),
        ("twice", "no_grid_wait", "races with the write of|nobody has written"),
    ],
)
def test_planted_bugs_are_found_whatever_the_order(kernel: str, bug: str, message: str) -> None:
    for seed in range(SEEDS):
        with pytest.raises(Broken, match=f"(?s){message}"):
            run(kernel, bug, seed, rounds=0 if kernel == "twice" else 6)


def test_a_grid_that_waits_for_itself_needs_all_of_it_resident() -> None:
    with pytest.raises(Broken, match="deadlock"):
        run("exchange", "none", 0, resident=2)
