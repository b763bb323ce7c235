"""Quantised linear layers against their definition, at every level of this CPU and at those it lacks, emulated."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuseline.kernels.cpu.linear import describe_weight, linear
from fuseline.kernels.cpu.rounding import round_weight
from fuseline.kernels.errors import KernelArgumentError
from fuseline.kernels.quantized import QuantizedWeight, tensor_layout
from fuseline.kernels.reference import quantized as reference

Tensor = torch.Tensor
FORMATS = [(8, 0, False), (4, 32, True), (4, 32, False), (4, 64, True), (4, 128, True)]


def random_weight(bits: int, rows: int, cols: int, group: int, zeros: bool, order: bool = False) -> QuantizedWeight:
    """All integers, zero points and scales that the format allows, in memory that ends where they end."""
    layout = tensor_layout(bits, rows, cols, group, zeros=zeros, order=order)
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in layout.items()}
    if order:
        tensors["order"] = torch.randperm(cols).int()
    weight = QuantizedWeight(bits, rows, cols, group, **tensors)
    if bits == 8:
        reference.pack_int8(torch.randint(-128, 128, (rows, cols), dtype=torch.int8), torch.rand(rows) + 0.1, weight)
        return weight
    groups = layout["scales"][0][1]
    scales = (torch.rand(rows, groups) + 0.1).half()
    zero_points = torch.randint(0, 17, (rows, groups), dtype=torch.uint8) if zeros else None
    reference.pack_int4(torch.randint(0, 16, (rows, cols), dtype=torch.uint8), scales, zero_points, weight)
    return weight


def random_input(m: int, cols: int) -> Tensor:
    """Rows of very different sizes, blocks of zeros, ties when rounded."""
    x = torch.randn(m, cols) * torch.logspace(-3, 3, m)[:, None]
    x[:, : cols // 4] = torch.randint(-254, 255, (m, cols // 4)) / 2
    x[m // 2, cols // 3 :] = 0
    return x


def int8_result(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """What the format demands, to the bit."""
    if weight.order is not None:
        x = x[:, weight.order]
    scales = x.abs().amax(1) / 127
    q = (x * torch.where(scales > 0, 1 / scales, 0.0)[:, None]).round()
    sums = (q.double() @ reference.unpack(weight).double().T).float()
    result = sums * (weight.scales[: weight.rows] * scales[:, None])
    return result if bias is None else result + bias


@settings(max_examples=80, deadline=None)
@given(
    m=st.one_of(st.integers(1, 20), st.integers(60, 90)),
    rows=st.integers(1, 70),
    cols=st.one_of(st.integers(1, 200), st.integers(500, 520)),
    form=st.sampled_from(FORMATS),
    with_bias=st.booleans(),
    with_order=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_agrees_with_the_definition(
    linear_library: ctypes.CDLL,
    m: int,
    rows: int,
    cols: int,
    form: tuple[int, int, bool],
    with_bias: bool,
    with_order: bool,
    threads: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    weight = random_weight(form[0], rows, cols, *form[1:], order=with_order)
    x = random_input(m, cols)
    bias = torch.randn(rows) if with_bias else None
    assert linear_library.fl_cpu_team_resize(threads, None) == 0
    result = linear(linear_library, x, [weight], [bias])
    if weight.bits == 8:
        assert torch.equal(result, int8_result(x, weight, bias))
        return
    ordered = x if weight.order is None else x[:, weight.order]
    rounded = reference.round_activations(ordered, 32).double()
    values = reference.dequantize(weight).double()
    exact = rounded @ values.T + (0 if bias is None else bias.double())
    # Each block's sum is an integer; what is rounded are products with scales and the sum over blocks.
    blocks = -(-cols // 32)
    size = rounded.abs() @ (values.abs().amax(1, keepdim=True) + 16 * 1.1).expand_as(values).T
    assert ((result - exact).abs() <= size * 2**-23 * (blocks + 4) + 1e-6).all()


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_row_does_not_depend_on_its_batch_its_place_or_the_threads(
    linear_library: ctypes.CDLL, form: tuple[int, int, bool]
) -> None:
    torch.manual_seed(0)
    weight, x = random_weight(form[0], 100, 333, *form[1:]), random_input(71, 333)
    linear_library.fl_cpu_team_resize(1, None)
    alone = torch.cat([linear(linear_library, row[None], [weight]) for row in x])
    for threads in (1, 2, 3):
        linear_library.fl_cpu_team_resize(threads, None)
        for first, end in ((0, 71), (5, 71), (1, 3), (7, 10), (13, 64), (2, 7)):
            assert torch.equal(linear(linear_library, x[first:end], [weight]), alone[first:end])


@pytest.mark.parametrize("form", [FORMATS[0], FORMATS[1]], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_spoils_no_other(
    linear_library: ctypes.CDLL, form: tuple[int, int, bool], bad: float
) -> None:
    torch.manual_seed(0)
    weight, x = random_weight(form[0], 20, 96, *form[1:]), random_input(9, 96)
    expected = linear(linear_library, x, [weight])
    x[4, 77] = bad
    result = linear(linear_library, x, [weight])
    assert result[4].isnan().all()
    kept = [row for row in range(9) if row != 4]
    assert torch.equal(result[kept], expected[kept])


def test_the_largest_integers_do_not_overflow(linear_library: ctypes.CDLL) -> None:
    for bits, group, q in ((8, 0, -128), (8, 0, 127), (4, 32, 15)):
        weight = random_weight(bits, 16, 4096, group, zeros=bits == 4)
        dtype = torch.int8 if bits == 8 else torch.uint8
        integers = torch.full((16, 4096), q, dtype=dtype)
        if bits == 8:
            reference.pack_int8(integers, torch.ones(16), weight)
        else:
            ones = torch.ones(16, 128)
            reference.pack_int4(integers, ones.half(), torch.zeros(16, 128, dtype=torch.uint8), weight)
        for m, value in ((1, -127.0), (3, -127.0), (33, -127.0), (33, 127.0)):
            result = linear(linear_library, torch.full((m, 4096), value), [weight])
            assert torch.equal(result, torch.full((m, 16), value * q * 4096))


def test_an_order_of_columns_that_do_not_exist_is_refused() -> None:
    weight = random_weight(4, 16, 64, 32, zeros=False, order=True)
    assert weight.order is not None
    for order in (weight.order + 1, weight.order - 1):
        with pytest.raises(KernelArgumentError, match="order names columns"):
            describe_weight(replace(weight, order=order))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    cols=st.one_of(st.integers(1, 200), st.integers(500, 520)),
    form=st.sampled_from([(8, 0), (4, 32), (4, 64), (4, 128)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_rounding_weights_gives_the_bits_of_the_reference(
    library: ctypes.CDLL, rows: int, cols: int, form: tuple[int, int], dtype: torch.dtype, threads: int, seed: int
) -> None:
    torch.manual_seed(seed)
    bits, group = form
    weight = torch.randn(rows, cols + 3) * torch.logspace(-6, 2, rows)[:, None]
    weight[:, : cols // 4] = torch.randint(-30, 31, (rows, cols // 4)) / 2  # ties
    weight[rows // 2, cols // 3 :] = 0
    weight[rows // 3] = weight[rows // 3].abs()
    weight = weight.to(dtype)[:, :cols]
    rounded = random_weight(bits, rows, cols, group, zeros=bits == 4)
    expected = random_weight(bits, rows, cols, group, zeros=bits == 4)
    if bits == 8:
        reference.pack_int8(*reference.round_to_int8(weight), expected)
    else:
        reference.pack_int4(*reference.round_to_int4(weight, group), expected)
    library.fl_cpu_team_resize(threads, None)
    round_weight(library, weight, rounded)
    for name, tensor in expected.tensors().items():
        assert torch.equal(rounded.tensors()[name], tensor), name


def test_only_what_fits_is_rounded(library: ctypes.CDLL) -> None:
    for out in (random_weight(8, 16, 64, 0, zeros=False), random_weight(4, 16, 65, 32, zeros=False)):
        with pytest.raises(KernelArgumentError, match="cannot round"):
            round_weight(library, torch.ones(16, 65), out)
    out = random_weight(8, 4, 64, 0, zeros=False)
    for bad in (float("nan"), float("inf")):
        weight = torch.ones(4, 64)
        weight[2, 63] = bad
        round_weight(library, weight, out)
        assert out.scales[:4].isfinite().tolist() == [True, True, False, True]
