"""Linear layers against float64, at every level that this CPU runs."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuseline.kernels.cpu.linear import describe_weight, linear
from fuseline.kernels.errors import KernelArgumentError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def rounds_input(request: pytest.FixtureRequest) -> bool:
    """Whether bf16 weights take x in bf16."""
    return "amx" in request.node.callspec.params["linear_library"]


def expected(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64, and a bound of the error: rounding once per product and addition along cols, at most."""
    exact = x.double() @ weight.double().T
    bound = (x.double().abs() @ weight.double().abs().T) * 2**-23 * (x.shape[1] ** 0.5 + 4)
    return (exact if bias is None else exact + bias.double()), bound + 1e-6


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.one_of(st.integers(1, 37), st.integers(88, 110)),
    rows=st.integers(1, 130),
    cols=st.one_of(st.integers(1, 80), st.integers(1000, 1100)),
    dtype=st.sampled_from(DTYPES),
    gap=st.integers(0, 3),
    with_bias=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_agrees_with_float64(
    linear_library: ctypes.CDLL,
    rounds_input: bool,
    m: int,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    gap: int,
    with_bias: bool,
    threads: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(m, cols + gap)[:, :cols]
    weight = torch.full((rows, cols + gap), float("nan"), dtype=dtype)[:, :cols]
    weight.copy_(torch.randn(rows, cols))
    bias = torch.randn(rows) if with_bias else None
    assert linear_library.fl_cpu_team_resize(threads, None) == 0
    rounded = x.bfloat16().float() if rounds_input and dtype == torch.bfloat16 else x
    exact, bound = expected(rounded, weight, bias)
    result = linear(linear_library, x, [weight], [bias])
    assert ((result.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_batch_its_place_or_the_threads(
    linear_library: ctypes.CDLL, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(131, 1003), torch.randn(150, 1003).to(dtype)
    linear_library.fl_cpu_team_resize(1, None)
    alone = torch.cat([linear(linear_library, row[None], [weight]) for row in x])
    for threads in (1, 2, 3):
        linear_library.fl_cpu_team_resize(threads, None)
        for first, end in ((0, 131), (5, 76), (1, 3), (7, 10), (13, 112)):
            assert torch.equal(linear(linear_library, x[first:end], [weight]), alone[first:end])
    parts = linear(linear_library, x, [weight[:3], weight[3:80], weight[80:]])
    assert torch.equal(parts, alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_batch_where_several_blocks_of_rows_and_columns_are_taken(
    library: ctypes.CDLL, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(520, 4107), torch.randn(35, 4107).to(dtype), torch.randn(35)
    library.fl_cpu_team_resize(2, None)
    alone = torch.cat([linear(library, row[None], [weight], [bias]) for row in x])
    assert torch.equal(linear(library, x, [weight], [bias]), alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_and_nan_weights_pass_through(linear_library: ctypes.CDLL, dtype: torch.dtype) -> None:
    weight = torch.tensor([[1.0, float("inf")], [float("nan"), 1.0], [2.0**-24, -0.0]]).to(dtype)
    result = linear(linear_library, torch.ones(1, 2), [weight])
    assert torch.equal(result[0, [0, 2]], torch.tensor([float("inf"), weight[2, 0].item()]))
    assert result[0, 1].isnan()


def test_empty_batches_and_weights(linear_library: ctypes.CDLL) -> None:
    assert linear(linear_library, torch.ones(0, 8), [torch.ones(4, 8)]).shape == (0, 4)
    assert linear(linear_library, torch.ones(3, 8), [torch.ones(0, 8), torch.ones(2, 8)]).tolist() == [[8.0, 8.0]] * 3


@pytest.mark.parametrize(
    ("x", "weights", "match"),
    [
        (torch.ones(2, 8), [torch.ones(4, 9)], "x must be"),
        (torch.ones(2, 8).bfloat16(), [torch.ones(4, 8)], "x must be"),
        (torch.ones(8), [torch.ones(4, 8)], "x must be"),
        (torch.ones(8, 2).T, [torch.ones(4, 8)], "rows of x"),
        (torch.ones(2, 8), [torch.ones(8, 4).T], "rows of a weight"),
        (torch.ones(2, 8), [torch.ones(1, 8).expand(4, 8)], "rows of a weight"),
        (torch.ones(2, 8), [torch.ones(4, 8, dtype=torch.float64)], "a weight is"),
        (torch.ones(2, 8), [torch.ones(4, 8, device="meta")], "a weight is"),
        (torch.ones(2, 8), [torch.ones(4, 8), torch.ones(4, 8).half()], "one dtype"),
        (torch.ones(2, 8), [], "0 weights"),
    ],
)
def test_misfits_are_refused(
    linear_library: ctypes.CDLL, x: torch.Tensor, weights: list[torch.Tensor], match: str
) -> None:
    with pytest.raises(KernelArgumentError, match=match):
        linear(linear_library, x, weights)


def test_a_bias_must_fit() -> None:
    for bias in (torch.ones(3), torch.ones(4).half(), torch.ones(8)[::2]):
        with pytest.raises(KernelArgumentError, match="bias must be"):
            describe_weight(torch.ones(4, 8), bias)
