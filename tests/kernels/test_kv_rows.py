"""Rows of an int8 KV cache: what they keep of what was written, and the native rounding to the same bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuseline.kernels.cpu.library import native_library
from fuseline.kernels.kv_rows import dequantize_rows, quantize_rows, row_head_dim, row_width
from fuseline.tests.kernels.cpu.decoder_cases import Runner, Sequence, Shape, draw_tokens, make_plan

TINY = float(np.finfo(np.float32).smallest_subnormal)
floats = st.floats(-(2.0**126), 2.0**126, width=32)


@settings(max_examples=200, deadline=None)
@given(st.lists(floats, min_size=1, max_size=20))
def test_an_element_is_at_most_half_a_step_off(values: list[float]) -> None:
    rows = quantize_rows(torch.tensor(values))
    exact, largest = np.array(values, np.float64), max(map(abs, values))
    assert rows.dtype == torch.int8
    assert rows.shape == (len(values) + 4,)
    assert rows[:-4].abs().max() <= 127
    step = largest / 127
    off = np.abs(dequantize_rows(rows).double().numpy() - exact).max()
    # Beside that the scale is rounded: 127 times over, by a part of itself or, where there is no less, by TINY.
    assert off <= step * 0.50001 + largest * 2.0**-23 + 64 * TINY


def test_halves_go_to_the_even() -> None:
    rows = quantize_rows(torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, -127.0]))
    assert rows[:-4].tolist() == [127, 0, 2, 2, 0, -2, -126, -127]
    assert dequantize_rows(rows).tolist() == [127, 0, 2, 2, 0, -2, -126, -127]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_its_own_row_and_no_other(bad: float) -> None:
    x = torch.randn(3, 2, 8)
    expected = dequantize_rows(quantize_rows(x))
    x[1, 0, 3] = bad
    got = dequantize_rows(quantize_rows(x))
    assert got[1, 0].isnan().all()
    got[1, 0] = expected[1, 0]
    assert torch.equal(got, expected)


def test_zeros_stay_zeros_and_widths_fit() -> None:
    rows = quantize_rows(torch.zeros(1, 10))
    assert not rows.any()
    assert not dequantize_rows(rows).any()
    for dtype, width in ((torch.int8, 14), (torch.bfloat16, 10)):
        assert row_width(10, dtype) == width
        assert row_head_dim(torch.zeros(1, width, dtype=dtype)) == 10


@pytest.mark.parametrize("head_dim", [2, 10, 64])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 3e-44, 1e37])
def test_native_rows_are_the_reference_to_the_bit(head_dim: int, scale: float) -> None:
    """The first layer's KV, which no cache has touched, as a float32 cache holds it."""
    library = native_library()
    if library is None:
        pytest.skip("no compiler")
    plan = make_plan(Shape(head_dim=head_dim, qk_norm=False, biases=False, windows=(None,)), 4)
    plan.layers[0].attention.qkv.mul_(scale)  # type: ignore[union-attr]
    caches = []
    for kv_dtype in (torch.float32, torch.int8):
        runner = Runner(library, plan, 16, num_blocks=4, kv_dtype=kv_dtype)
        runner.cache.zero_()
        runner.run([(Sequence(draw_tokens(1, 40)), 40)])
        caches.append(runner.cache)
    assert caches[0].any()
    assert torch.equal(quantize_rows(caches[0]), caches[1])
