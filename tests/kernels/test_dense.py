"""The dense ops against their definitions in float64, and what their launchers refuse."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from fuseline.kernels import ops
from fuseline.kernels.ops import AttentionSpec, AttentionWeights, KernelArgumentError, MlpWeights

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(result: torch.Tensor, exact: torch.Tensor) -> None:
    """Within one rounding of the result's dtype, with some room for float32 arithmetic."""
    eps = torch.finfo(result.dtype).eps
    bound = 1.01 * eps / 2 * exact.abs() + 1e-5 * (1 + exact.abs())
    assert ((result.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bounds", [[0, 11], [0, 6, 11], [0, 3, 6, 9, 11], [0, 0, 11]])
def test_vocabulary_shards_add_up_to_the_table(bounds: list[int], dtype: torch.dtype) -> None:
    table = randn(11, 8, dtype=dtype)
    ids = torch.tensor([10, 0, 5, 6, 3, 10])
    shards = [ops.embedding(ids, table[low:high], low, 11) for low, high in itertools.pairwise(bounds)]
    assert torch.equal(torch.stack(shards).sum(0), table[ids].float())
    poisoned = torch.full_like(table[:3], float("nan"))
    assert torch.equal(ops.embedding(torch.tensor([3, 10]), poisoned, 0, 11), torch.zeros(2, 8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype) -> None:
    x, delta, weight = (randn(5, 3, 24, seed=i, dtype=dtype) for i in range(3))
    weight = weight[0, 0]
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double()
    assert_close(ops.rms_norm(x, weight, 1e-3), exact)
    residual = randn(5, 3, 24, seed=3)
    before = residual.clone()
    for part in (delta, delta.float()):
        total, normed = ops.add_rms_norm(residual, part, weight, 1e-3)
        assert torch.equal(total, residual + part)
        assert torch.equal(normed, ops.rms_norm(residual + part, weight, 1e-3))
    assert torch.equal(residual, before)
    assert torch.equal(ops.add_rms_norm(residual, None, weight, 1e-3)[1], ops.rms_norm(residual, weight, 1e-3))
    assert normed.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_embedding(dtype: torch.dtype) -> None:
    positions = torch.tensor([0, 1, 5000, 131071])
    inv_freq = 500000.0 ** -(torch.arange(0, 32, 2) / 32)
    cos, sin = ops.rotary_cos_sin(positions, inv_freq, 1.25)
    x = randn(4, 3, 32, dtype=dtype)
    angles = (positions[:, None].float() * inv_freq).double()
    turns = torch.polar(torch.full_like(angles, 1.25), angles)[:, None]
    turned = torch.complex(x[..., :16].double(), x[..., 16:].double()) * turns
    assert_close(ops.rotary_embedding(x, cos, sin), torch.cat((turned.real, turned.imag), -1))
    each = ops.rotary_cos_sin(positions, inv_freq.expand(4, 16), 1.25)
    assert torch.equal(each[0], cos)
    assert torch.equal(each[1], sin)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_and_activation_and_gather(dtype: torch.dtype) -> None:
    x, weight, bias = randn(7, 16, dtype=dtype), randn(10, 16, seed=1, dtype=dtype), randn(10, seed=2, dtype=dtype)
    assert_close(ops.linear(x, weight), x.double() @ weight.double().T)
    assert_close(ops.linear(x, weight, bias), x.double() @ weight.double().T + bias.double())
    gate, up = x.double().chunk(2, -1)
    result = ops.silu_and_mul(x)
    assert (result.double() - gate * gate.sigmoid() * up).abs().max() < 8 * torch.finfo(dtype).eps
    assert torch.equal(ops.gather_rows(x, torch.tensor([6, 0, 0])), x[[6, 0, 0]])


def test_blocks_keep_the_residual_apart() -> None:
    gate_up, down = randn(24, 8, seed=1), randn(8, 12, seed=2)
    weights = MlpWeights(norm=randn(8), gate_up=gate_up, down=down)
    residual, delta = randn(3, 8, seed=3), randn(3, 8, seed=4)
    total, out = ops.mlp_block(residual, delta, weights, 1e-5)
    assert torch.equal(total, residual + delta)
    again = ops.mlp_block(residual + delta, None, weights, 1e-5)[1]
    assert torch.equal(out, again)
    gate, up = (ops.rms_norm(total, weights.norm, 1e-5).double() @ gate_up.double().T).chunk(2, -1)
    assert (out - gate * gate.sigmoid() * up @ down.double().T).abs().max() < 1e-4
    indices = torch.tensor([2, 0])
    logits = ops.head(residual, delta, weights.norm, randn(5, 8, seed=5), indices, 1e-5)
    exact = ops.rms_norm(total, weights.norm, 1e-5)[indices].double() @ randn(5, 8, seed=5).double().T
    assert (logits - exact).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_residual_stream_is_float32_whatever_the_weights(dtype: torch.dtype) -> None:
    down = randn(8, 12, seed=2, dtype=dtype)
    weights = MlpWeights(randn(8, dtype=dtype), randn(24, 8, seed=1, dtype=dtype), down)
    residual = 1 + randn(3, 8, seed=3) * 1e-4  # what the weights' dtype would round away
    for delta in (None, randn(3, 8, seed=4, dtype=dtype), randn(3, 8, seed=4)):
        total, _ = ops.mlp_block(residual, delta, weights, 1e-5)
        assert torch.equal(total, residual if delta is None else residual + delta)
    logits = ops.head(residual, None, weights.norm, down.T.contiguous(), torch.tensor([1]), 1e-5)
    assert logits.dtype == torch.float32


IDS = torch.tensor([1, 2])
REFUSED: list[Callable[[], object]] = [
    lambda: ops.embedding(IDS.int(), randn(4, 8), 0, 4),
    lambda: ops.embedding(IDS[None], randn(4, 8), 0, 4),
    lambda: ops.embedding(IDS, randn(4), 0, 4),
    lambda: ops.embedding(IDS, randn(4, 8), 1, 4),
    lambda: ops.embedding(IDS, randn(4, 8), -1, 4),
    lambda: ops.rms_norm(randn(2, 8), randn(7), 1e-5),
    lambda: ops.rms_norm(randn(2, 8).half(), randn(8).bfloat16(), 1e-5),
    lambda: ops.rms_norm(IDS, IDS, 1e-5),
    lambda: ops.add_rms_norm(randn(2, 8), randn(8), randn(8), 1e-5),
    lambda: ops.add_rms_norm(randn(2, 8).half(), None, randn(8).half(), 1e-5),
    lambda: ops.add_rms_norm(randn(2, 8), randn(2, 8).half(), randn(8).bfloat16(), 1e-5),
    lambda: ops.linear(randn(2, 8), randn(4, 7)),
    lambda: ops.linear(randn(2, 8), randn(4, 8), randn(5)),
    lambda: ops.linear(randn(2, 8), randn(4, 8), randn(4).bfloat16()),
    lambda: ops.linear(randn(2, 8), randn(4, 8).to("meta")),
    lambda: ops.rotary_cos_sin(IDS, randn(8).double()),
    lambda: ops.rotary_cos_sin(IDS, randn(3, 8)),
    lambda: ops.rotary_cos_sin(IDS.float(), randn(8)),
    lambda: ops.rotary_embedding(randn(2, 3, 8), randn(2, 8), randn(2, 8)),
    lambda: ops.rotary_embedding(randn(2, 3, 7), randn(2, 3), randn(2, 3)),
    lambda: ops.rotary_embedding(randn(2, 8), randn(2, 4), randn(2, 4)),
    lambda: ops.silu_and_mul(randn(2, 7)),
    lambda: ops.gather_rows(randn(2, 7), IDS.int()),
    lambda: ops.head(randn(2, 8), None, randn(8), randn(4, 7), IDS, 1e-5),
    lambda: ops.mlp_block(randn(2, 7), None, MlpWeights(randn(8), randn(8, 8), randn(8, 4)), 1e-5),
    lambda: MlpWeights(randn(8), randn(8, 8), randn(8, 5)).check(),
    lambda: MlpWeights(randn(8), randn(8, 8), randn(8, 4), down_bias=randn(4)).check(),
    lambda: AttentionSpec(6, 4, 16, 1.0, 1e-5),
    lambda: AttentionSpec(4, 4, 16, 1.0, 1e-5, sliding_window=0),
    lambda: AttentionWeights(randn(8), randn(64, 8), randn(8, 32)).check(AttentionSpec(2, 2, 16, 1.0, 1e-5)),
    lambda: AttentionWeights(randn(8), randn(96, 8), randn(8, 32).half()).check(AttentionSpec(2, 2, 16, 1.0, 1e-5)),
    lambda: AttentionWeights(randn(8), randn(96, 8), randn(8, 32), k_norm=randn(16)).check(
        AttentionSpec(2, 2, 16, 1.0, 1e-5)
    ),
    lambda: AttentionWeights(randn(8), randn(96, 8), randn(8, 32), q_norm=randn(16), k_norm=randn(8)).check(
        AttentionSpec(2, 2, 16, 1.0, 1e-5)
    ),
]


@pytest.mark.parametrize("call", REFUSED)
def test_arguments_that_do_not_fit_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(KernelArgumentError):
        call()
