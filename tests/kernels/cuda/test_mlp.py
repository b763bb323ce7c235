"""The MLP block under the emulator, against float64."""

from __future__ import annotations

import ctypes
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from fuseline.kernels.cuda.header import read_headers
from fuseline.kernels.packed import UNIT_ROWS, pack
from fuseline.tests.kernels.cuda.emulation import CUDA, Array, Broken, Emulation, build_kernels, from_bf16, to_bf16

EPS = 1e-5


@dataclass(frozen=True)
class Weights:
    """bf16 bit patterns, row-major."""

    norm: Array
    gate_up: Array
    gate_up_bias: Array
    down: Array
    down_bias: Array

    @classmethod
    def random(cls, hidden: int, inner: int) -> Weights:
        rng = np.random.default_rng(hidden + inner)

        def draw(*shape: int, scale: float) -> Array:
            return to_bf16((rng.standard_normal(shape) * scale).astype(np.float32))

        return cls(
            norm=to_bf16(rng.uniform(0.5, 1.5, hidden).astype(np.float32)),
            gate_up=draw(2 * inner, hidden, scale=hidden**-0.5),
            gate_up_bias=draw(2 * inner, scale=0.2),
            down=draw(hidden, inner, scale=inner**-0.5),
            down_bias=draw(hidden, scale=0.2),
        )


def packed(weight: Array, interleave: bool = False) -> Array:
    tensor = torch.from_numpy(weight.view(np.int16))
    result: Array = pack(tensor, tensor.shape[0] if interleave else UNIT_ROWS).numpy().view(np.uint16)
    return result


def reference(weights: Weights, h: Array, bias: bool) -> Array:
    """float64."""
    gate_up, down, norm = (from_bf16(w).astype(np.float64) for w in (weights.gate_up, weights.down, weights.norm))
    h = h.astype(np.float64)
    normed = h / np.sqrt((h**2).mean(-1, keepdims=True) + EPS) * norm
    gate, up = np.split(normed @ gate_up.T + bias * from_bf16(weights.gate_up_bias), 2, axis=-1)
    result: Array = (gate / (1 + np.exp(-gate)) * up) @ down.T + bias * from_bf16(weights.down_bias)
    return result


def run(
    weights: Weights,
    residual: Array,
    delta: Array | None,
    *,
    seed: int,
    cluster: int = 2,
    num_clusters: int = 2,
    stages: int = 2,
    bias: bool = True,
    repeats: int = 1,
    max_shared_bytes: int = 0,
    library: Path | None = None,
) -> tuple[Array, Array]:
    """residual_out and delta_out, after ``repeats`` runs in a row on the same workspace."""
    library = library or build_kernels("emulated-mlp", CUDA / "mlp.cu")
    header = read_headers(CUDA / "api.h")
    batch, hidden = residual.shape
    emulation = Emulation(library, seed)
    residual_out, residual_address = emulation.output("residual_out", residual.shape)
    delta_out, delta_address = emulation.output("delta_out", residual.shape)
    args = header.structs["fl_mlp_args"](
        version=header.constants["FL_CUDA_API"],
        batch=batch,
        hidden=hidden,
        inner=weights.down.shape[1],
        eps=EPS,
        launch=header.structs["fl_launch"](
            cluster=cluster,
            num_clusters=num_clusters,
            stages=stages,
            dependent=1,
            max_shared_bytes=max_shared_bytes,
        ),
        residual=emulation.input("residual", residual),
        delta=emulation.input("delta", delta) if delta is not None else None,
        norm=emulation.input("norm", weights.norm),
        gate_up=emulation.input("gate_up", packed(weights.gate_up, interleave=True)),
        gate_up_bias=emulation.input("gate_up_bias", weights.gate_up_bias) if bias else None,
        down=emulation.input("down", packed(weights.down)),
        down_bias=emulation.input("down_bias", weights.down_bias) if bias else None,
        residual_out=residual_address,
        delta_out=delta_address,
        prefetch_bytes=10_000,
    )
    args.prefetch = args.gate_up
    functions = ctypes.CDLL(str(library))
    functions.fl_cuda_mlp_workspace.restype = ctypes.c_int64
    bytes_needed = functions.fl_cuda_mlp_workspace(ctypes.byref(args))
    workspace = np.zeros(bytes_needed + 256, np.uint8)
    start = -workspace.ctypes.data % 256
    args.workspace = emulation.buffer("workspace", workspace[start : start + bytes_needed], writable=True)
    for _ in range(repeats):
        assert functions.fl_cuda_mlp_block(ctypes.byref(args)) == 0
    emulation.run()
    return residual_out, delta_out


def stream(batch: int, hidden: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(batch)
    residual = rng.standard_normal((batch, hidden)).astype(np.float32) * 3
    return residual, rng.standard_normal((batch, hidden)).astype(np.float32)


def close(actual: Array, expected: Array) -> bool:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected)) < 6e-3


@pytest.mark.parametrize(
    ("batch", "hidden", "inner", "cluster", "num_clusters", "stages"),
    [
        (1, 256, 512, 4, 2, 3),
        (3, 256, 320, 2, 3, 1),
        (8, 256, 320, 1, 3, 2),
        (9, 256, 480, 4, 1, 2),
        (16, 512, 256, 8, 1, 4),
        (33, 128, 160, 2, 1, 2),
    ],
)
def test_matches_float64(batch: int, hidden: int, inner: int, cluster: int, num_clusters: int, stages: int) -> None:
    weights = Weights.random(hidden, inner)
    residual, delta = stream(batch, hidden)
    residual_out, delta_out = run(
        weights, residual, delta, seed=batch, cluster=cluster, num_clusters=num_clusters, stages=stages
    )
    np.testing.assert_array_equal(residual_out, residual + delta)
    assert close(delta_out, reference(weights, residual + delta, bias=True))


def test_a_row_is_the_same_in_any_batch_order_and_grid() -> None:
    weights = Weights.random(256, 320)
    residual, delta = stream(9, 256)
    _, together = run(weights, residual, delta, seed=0, num_clusters=2)
    for seed in range(1, 5):
        _, again = run(weights, residual, delta, seed=seed, num_clusters=1 + seed % 3, stages=1 + seed % 2)
        np.testing.assert_array_equal(again, together)
    for row in (0, 4, 8):
        _, alone = run(weights, residual[row : row + 1], delta[row : row + 1], seed=row)
        np.testing.assert_array_equal(alone[0], together[row])
        _, pair = run(weights, residual[[8, row]], delta[[8, row]], seed=row)
        np.testing.assert_array_equal(pair, together[[8, row]])


@pytest.mark.parametrize("seed", range(4))
def test_optional_inputs_and_a_second_launch_on_the_same_workspace(seed: int) -> None:
    weights = Weights.random(256, 320)
    residual, _ = stream(5, 256)
    residual_out, delta_out = run(weights, residual, None, seed=seed, bias=False, repeats=2)
    np.testing.assert_array_equal(residual_out, residual)
    assert close(delta_out, reference(weights, residual, bias=False))


@pytest.mark.parametrize(("seed", "inner", "cluster"), [(0, 1120, 2), (1, 480, 1), (2, 1600, 4)])
def test_taking_the_activations_in_parts_changes_no_bit(seed: int, inner: int, cluster: int) -> None:
    weights = Weights.random(160, inner)
    residual, delta = stream(4, 160)
    whole, parts = (
        run(weights, residual, delta, seed=seed, cluster=cluster, num_clusters=1, stages=1, max_shared_bytes=limit)
        for limit in (0, 1)
    )
    np.testing.assert_array_equal(parts[1], whole[1])
    assert close(parts[1], reference(weights, residual + delta, bias=True))


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("linear.cuh", "__syncwarp(); // what any lane sends", "races with the read of"),
        ("linear.cuh", "owner_ = owner_ + 1 == cluster_ ? 0 : owner_ + 1;", "races with|same phase"),
        ("activations.cuh", "    ptx::fence_proxy_async();", "without its proxy fence"),
        ("activations.cuh", "ptx::mbarrier_wait(empty(buffer ^ 1), (now_ - 1) / 2 % 2);", "races with the read of"),
        ("mlp.cu", "grid_barrier(static_cast<uint32_t*>(args.workspace));", "races with|nobody|proxy fence"),
        ("mlp.cu", "ptx::grid_wait();", "races with"),
    ],
)
def test_leaving_a_protection_out_is_noticed(tmp_path: Path, file: str, line: str, message: str) -> None:
    folder = tmp_path / "cuda"
    shutil.copytree(CUDA, folder)
    text = (folder / file).read_text()
    assert text.count(line) == 1
    (folder / file).write_text(text.replace(line, "//"))
    library = build_kernels("mutated-mlp", folder / "mlp.cu", folder=folder)
    weights = Weights.random(64, 544)
    residual, delta = stream(17, 64)
    with pytest.raises(Broken, match=message):
        run(weights, residual, delta, seed=1, num_clusters=1, max_shared_bytes=1, repeats=2, library=library)
