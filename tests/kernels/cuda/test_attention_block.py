"""The attention block under the emulator, against float64."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from fuseline.kernels.cuda.header import read_headers
from fuseline.kernels.packed import UNIT_ROWS, pack
from fuseline.tests.kernels.cuda.emulation import CUDA, Array, Emulation, aligned, build_kernels, from_bf16, to_bf16

EPS = 1e-5
NAN = 0x7FC1
OPPOSED = 4.0


@dataclass(frozen=True)
class Model:
    """The shape of one attention block, and the layout of its cache."""

    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    hidden: int = 256
    block: int = 16
    window: int = 0
    norms: bool = False
    bias: bool = False
    opposed: bool = False  # a bias makes queries point away from keys: all scores are far below zero

    @property
    def rows(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.dim

    def draw(self, name: str, *shape: int, scale: float = 1.0, mean: float | Array = 0.0) -> Array:
        rng = np.random.default_rng([len(name), *name.encode(), *shape])
        return to_bf16((mean + scale * rng.standard_normal(shape)).astype(np.float32))

    def weights(self) -> dict[str, Array]:
        """bf16 bit patterns, row-major."""
        towards = np.repeat([1, -1, 0], [n * self.dim for n in (self.heads, self.kv_heads, self.kv_heads)])
        return {
            "norm": self.draw("norm", self.hidden, scale=0.2, mean=1.0),
            "qkv": self.draw("qkv", self.rows, self.hidden, scale=self.hidden**-0.5),
            "qkv_bias": self.draw("qkv_bias", self.rows, scale=0.5, mean=self.opposed * OPPOSED * towards),
            "q_norm": self.draw("q_norm", self.dim, scale=0.3, mean=1.0),
            "k_norm": self.draw("k_norm", self.dim, scale=0.3, mean=1.0),
            "out": self.draw("out", self.hidden, self.heads * self.dim, scale=(self.heads * self.dim) ** -0.5),
            "out_bias": self.draw("out_bias", self.hidden, scale=0.5),
        }


@dataclass(frozen=True)
class Row:
    """A sequence: its number draws what it holds, and nothing else does."""

    context: int
    number: int = 0

    def draw(self, what: int, *shape: int) -> Array:
        rng = np.random.default_rng([self.number, self.context, what])
        return rng.standard_normal(shape).astype(np.float32)

    def stream(self, hidden: int) -> tuple[Array, Array]:
        return 2 * self.draw(0, hidden), self.draw(1, hidden)

    def history(self, model: Model) -> Array:
        """bf16 [2, K, context - 1, D]."""
        history = self.draw(2, 2, model.kv_heads, max(self.context - 1, 0), model.dim)
        if model.opposed:
            cos, sin = self.rotary(model.dim)
            history[0] -= OPPOSED * np.concatenate((cos - sin, cos + sin))
        return to_bf16(history)

    def rotary(self, dim: int) -> tuple[Array, Array]:
        angles = (self.context - 1) * 10000.0 ** (-2 * np.arange(dim // 2) / dim)
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


@dataclass(frozen=True)
class Launch:
    """How the block is spread over the emulated GPU."""

    cluster: int = 2
    num_clusters: int = 2
    stages: int = 3


@dataclass(frozen=True)
class Result:
    """float32 [B, H] each; for every row its new bf16 key and value [2, K, D]."""

    residual: Array
    delta: Array
    appended: Array


def expected(model: Model, row: Row) -> tuple[Array, Array]:
    """float64: the block's output, and the new key and value."""
    weights = {name: from_bf16(bits).astype(np.float64) for name, bits in model.weights().items()}
    residual, delta = row.stream(model.hidden)
    h = (residual + delta).astype(np.float64)
    x = h / np.sqrt((h**2).mean() + EPS) * weights["norm"]
    heads = (weights["qkv"] @ x + model.bias * weights["qkv_bias"]).reshape(-1, model.dim)
    cos, sin = (part.astype(np.float64) for part in row.rotary(model.dim))
    for head in range(model.heads + model.kv_heads):
        if model.norms:
            norm = weights["q_norm"] if head < model.heads else weights["k_norm"]
            heads[head] *= norm / np.sqrt((heads[head] ** 2).mean() + EPS)
        low, high = np.split(heads[head], 2)
        heads[head] = np.concatenate((low * cos - high * sin, high * cos + low * sin))
    new = heads[model.heads :].reshape(2, model.kv_heads, 1, model.dim)
    keys, values = np.concatenate((from_bf16(row.history(model)), new), axis=2)
    first = max(0, row.context - model.window) if model.window else 0
    attended = np.empty((model.heads, model.dim))
    for head in range(model.heads):
        kv_head = head // (model.heads // model.kv_heads)
        scores = keys[kv_head, first:] @ heads[head] / np.sqrt(model.dim)
        weight = np.exp(scores - scores.max())
        attended[head] = weight / weight.sum() @ values[kv_head, first:]
    return weights["out"] @ attended.ravel() + model.bias * weights["out_bias"], new[:, :, 0]


def packed(weight: Array, head_dim: int = 0) -> Array:
    tensor = torch.from_numpy(weight.view(np.int16))
    result: Array = pack(tensor, head_dim or UNIT_ROWS).numpy().view(np.uint16)
    return result


def run(
    model: Model,
    rows: Sequence[Row],
    *,
    seed: int,
    launch: Launch = Launch(),
    repeats: int = 1,
    with_delta: bool = True,
) -> Result:
    """One step, in a cache whose unused slots hold NaN and whose blocks are in any order.

    Checks that nothing else in the cache has changed. The runs of ``repeats`` are the same, one after another.
    """
    library = build_kernels("emulated-attention", CUDA / "attention_block.cu")
    header = read_headers(CUDA / "api.h")
    emulation = Emulation(library, seed)
    batch = len(rows)
    cache, tables = filled_cache(model, rows, np.random.default_rng(seed))
    before = cache.copy()
    streams = [row.stream(model.hidden) for row in rows]
    residual_out, residual_address = emulation.output("residual_out", (batch, model.hidden))
    delta_out, delta_address = emulation.output("delta_out", (batch, model.hidden))
    weights = model.weights()

    def optional(name: str, wanted: bool) -> int | None:
        return emulation.input(name, weights[name]) if wanted else None

    args = header.structs["fl_attention_args"](
        version=header.constants["FL_CUDA_API"],
        batch=batch,
        hidden=model.hidden,
        num_heads=model.heads,
        num_kv_heads=model.kv_heads,
        head_dim=model.dim,
        block_size=model.block,
        table_width=tables.shape[1],
        window=model.window,
        scale=model.dim**-0.5,
        eps=EPS,
        launch=header.structs["fl_launch"](**asdict(launch), dependent=1),
        num_blocks=cache.shape[1],
        residual=emulation.input("residual", np.stack([stream[0] for stream in streams])),
        delta=emulation.input("delta", np.stack([stream[1] for stream in streams])) if with_delta else None,
        norm=emulation.input("norm", weights["norm"]),
        qkv=emulation.input("qkv", packed(weights["qkv"], model.dim)),
        qkv_bias=optional("qkv_bias", model.bias),
        q_norm=optional("q_norm", model.norms),
        k_norm=optional("k_norm", model.norms),
        out=emulation.input("out", packed(weights["out"])),
        out_bias=optional("out_bias", model.bias),
        rotary_cos=emulation.input("cos", np.stack([row.rotary(model.dim)[0] for row in rows])),
        rotary_sin=emulation.input("sin", np.stack([row.rotary(model.dim)[1] for row in rows])),
        kv=emulation.buffer("kv", cache, writable=True),
        block_tables=emulation.input("block_tables", tables),
        context_lens=emulation.input("context_lens", np.array([row.context for row in rows], np.int32)),
        residual_out=residual_address,
        delta_out=delta_address,
    )
    functions = ctypes.CDLL(str(library))
    functions.fl_cuda_attention_workspace.restype = ctypes.c_int64
    workspace = aligned((functions.fl_cuda_attention_workspace(ctypes.byref(args)),), np.uint8)
    workspace[...] = 0
    args.workspace = emulation.buffer("workspace", workspace, writable=True)
    for _ in range(repeats):
        assert functions.fl_cuda_attention_block(ctypes.byref(args)) == 0
    emulation.run()
    groups = model.kv_heads * -(-model.heads // model.kv_heads // 8)
    assert not workspace[256 : 256 + 64 * groups * 8 * 4].any()  # the counters are ready for the next launch

    newest = [max(row.context - 1, 0) for row in rows]
    places = [(table[token // model.block], token % model.block) for table, token in zip(tables, newest, strict=True)]
    appended = np.stack([cache[:, block, :, offset] for block, offset in places])
    for block, offset in places:
        before[:, block, :, offset] = cache[:, block, :, offset]
    np.testing.assert_array_equal(cache, before)
    return Result(residual_out, delta_out, appended)


def filled_cache(model: Model, rows: Sequence[Row], rng: np.random.Generator) -> tuple[Array, Array]:
    """[2, blocks, K, block, D] and [B, W]; every row's history in blocks of its own, what no query may see is NaN."""
    counts = [max(-(-row.context // model.block), 1) for row in rows]
    blocks = iter(rng.permutation(sum(counts) + 3))
    cache = aligned((2, sum(counts) + 3, model.kv_heads, model.block, model.dim), np.uint16)
    cache[...] = NAN
    tables = np.full((len(rows), max(counts) + 1), 2**30, np.int32)
    for table, row, count in zip(tables, rows, counts, strict=True):
        table[:count] = [next(blocks) for _ in range(count)]
        first = max(0, row.context - model.window) if model.window else 0
        table[: first // model.block] = 2**30
        history = row.history(model)
        for token in range(first, row.context - 1):
            cache[:, table[token // model.block], :, token % model.block] = history[:, :, token]
    return cache, tables


def check(model: Model, rows: Sequence[Row], result: Result) -> None:
    for i, row in enumerate(rows):
        delta, appended = expected(model, row)
        residual = row.stream(model.hidden)
        np.testing.assert_array_equal(result.residual[i], residual[0] + residual[1])
        assert np.linalg.norm(result.delta[i] - delta) < 8e-3 * np.linalg.norm(delta), row
        np.testing.assert_allclose(from_bf16(result.appended[i]), appended, rtol=1.2e-2, atol=1.2e-2)


def some_rows(*contexts: int) -> list[Row]:
    return [Row(context, number) for number, context in enumerate(contexts)]


WIDE = Model(dim=128, block=64)
CASES = [
    (Model(), (1,), Launch(cluster=4)),
    (Model(), (15, 16, 17, 63, 64, 65), Launch()),
    (WIDE, (16, 1, 127), Launch(cluster=4)),
    (WIDE, (63, 64, 65, 300), Launch(stages=2)),
    (replace(WIDE, block=16, norms=True, bias=True), (1, 33), Launch(cluster=8, num_clusters=1)),
    (Model(heads=4, kv_heads=4, block=64, bias=True), (7, 90), Launch(cluster=1, num_clusters=3)),
    (Model(heads=8, kv_heads=1, norms=True), (40, 2), Launch(cluster=4, num_clusters=1)),
    (Model(heads=11, kv_heads=1, block=32), (70, 130), Launch()),
    (Model(heads=2, kv_heads=2, dim=128, window=20), (19, 20, 21, 100), Launch()),
    (Model(window=33), (310, 300, 5), Launch(cluster=4)),
    (Model(heads=2, kv_heads=1), (1025, 2100), Launch(cluster=4)),
    (Model(heads=2, kv_heads=1), tuple(range(1, 18)), Launch(num_clusters=1)),
]


@pytest.mark.parametrize(("model", "contexts", "launch"), CASES)
def test_matches_float64(model: Model, contexts: tuple[int, ...], launch: Launch) -> None:
    rows = some_rows(*contexts)
    check(model, rows, run(model, rows, seed=len(contexts), launch=launch))


def test_more_than_16_nodes_become_longer_nodes() -> None:
    model = Model(heads=2, kv_heads=1, block=64)
    rows = [Row(16 * 1024 + 70)]
    check(model, rows, run(model, rows, seed=0, launch=Launch(4)))


def test_scores_far_below_zero() -> None:
    model = Model(bias=True, opposed=True)
    rows = some_rows(1, 150, 20)
    check(model, rows, run(model, rows, seed=0))


def same(first: Result, second: Result, rows: Sequence[int], others: Sequence[int]) -> None:
    np.testing.assert_array_equal(first.delta[list(rows)], second.delta[list(others)])
    np.testing.assert_array_equal(first.appended[list(rows)], second.appended[list(others)])


@pytest.mark.parametrize("model", [Model(norms=True, bias=True), replace(WIDE, window=90)])
def test_a_row_is_the_same_in_any_batch_order_and_grid(model: Model) -> None:
    rows = some_rows(300, 1, 77, 16, 1100, 48, 5, 9, 130)
    together = run(model, rows, seed=0)
    check(model, rows, together)
    for seed, (num_clusters, stages) in enumerate([(1, 2), (3, 1), (5, 4)]):
        other = run(model, rows, seed=10 + seed, launch=Launch(2, num_clusters, stages))
        same(other, together, range(9), range(9))
    for row in (0, 4, 8):
        same(run(model, [rows[row]], seed=row), together, [0], [row])
    same(run(model, [rows[8], rows[4]], seed=20, launch=Launch(2, 3)), together, [0, 1], [8, 4])
    many = [*(replace(rows[i % 9], number=50 + i) for i in range(8)), rows[0], rows[2], *rows[5:9], *rows[1:4]]
    same(run(model, many, seed=21), together, [8, 9, *range(10, 17)], [0, 2, *range(5, 9), *range(1, 4)])


@pytest.mark.parametrize("seed", range(4))
def test_launches_one_after_another_on_the_same_workspace(seed: int) -> None:
    model = Model(heads=2, kv_heads=1, dim=128 if seed % 2 else 64)
    rows = some_rows(1030, 40, 2)
    once = run(model, rows, seed=100, launch=Launch(4), with_delta=False)
    same(run(model, rows, seed=seed, launch=Launch(4), with_delta=False, repeats=2), once, range(3), range(3))


def test_a_row_without_context_is_padding() -> None:
    rows = some_rows(20, 0, 33)
    result = run(Model(), rows, seed=3)
    same(result, run(Model(), [rows[0], rows[2]], seed=4), [0, 2], [0, 1])
    assert (result.appended[1] == NAN).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"version": 0},
        {"batch": 65},
        {"head_dim": 96},
        {"num_heads": 3},
        {"block_size": 24},
        {"block_size": 4},
        {"hidden": 100},
        {"window": -1},
        {"launch": {"cluster": 3, "num_clusters": 1, "stages": 2}},
        {"launch": {"cluster": 8, "num_clusters": 1, "stages": 2}},
        {"launch": {"cluster": 2, "num_clusters": 1, "stages": 0}},
    ],
)
def test_refuses_what_it_was_not_made_for(wrong: dict[str, Any]) -> None:
    header = read_headers(CUDA / "api.h")
    sizes = {"batch": 1, "hidden": 256, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "block_size": 16}
    fields = {"version": header.constants["FL_CUDA_API"], **sizes, "table_width": 1, **wrong}
    launch = fields.pop("launch", {"cluster": 2, "num_clusters": 1, "stages": 2})
    args = header.structs["fl_attention_args"](**fields, launch=header.structs["fl_launch"](**launch))
    functions = ctypes.CDLL(str(build_kernels("emulated-attention", CUDA / "attention_block.cu")))
    assert functions.fl_cuda_attention_block(ctypes.byref(args)) != 0
