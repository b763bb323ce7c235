"""Quantised weights: rounding, the layout byte by byte, and the linear layer over them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fuseline.kernels.errors import KernelArgumentError
from fuseline.kernels.quantized import QuantizedWeight, tensor_layout
from fuseline.kernels.reference import quantized as reference

Tensor = torch.Tensor
SHAPES = [(1, 1), (16, 64), (17, 65), (40, 96), (50, 352)]
GROUPS = [32, 64, 128]


def empty(bits: int, rows: int, cols: int, group: int = 0, zeros: bool = False) -> QuantizedWeight:
    layout = tensor_layout(bits, rows, cols, group, zeros=zeros)
    tensors = {name: torch.full(shape, 77, dtype=dtype) for name, (shape, dtype) in layout.items()}
    return QuantizedWeight(bits, rows, cols, group, **tensors)


def random_int4(rows: int, cols: int, group: int, zeros: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Integers below 16, scales and zeros, all of which occur."""
    draw = torch.Generator().manual_seed(seed)
    groups = -(-cols // group)
    q = torch.randint(16, (rows, cols), generator=draw, dtype=torch.uint8)
    scales = (torch.rand((rows, groups), generator=draw) + 0.1).half()
    return q, scales, torch.randint(17, (rows, groups), generator=draw, dtype=torch.uint8) if zeros else None


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_int8_lies_in_memory_as_documented(rows: int, cols: int) -> None:
    q = torch.randint(-127, 128, (rows, cols), dtype=torch.int8)
    scales = torch.rand(rows)
    weight = empty(8, rows, cols)
    reference.pack_int8(q, scales, weight)
    data = torch.zeros((-(-rows // 16) * 16, -(-cols // 64) * 64), dtype=torch.int8)
    data[:rows, :cols] = q
    expected = data.view(-1, 16, data.shape[1] // 4, 4)
    assert torch.equal(weight.data, torch.stack([expected[:, :, step] for step in range(expected.shape[2])], 1))
    assert torch.equal(weight.scales[:rows], scales)
    assert not weight.scales[rows:].any()
    assert torch.equal(reference.unpack(weight), q)
    assert torch.equal(reference.dequantize(weight), q * scales[:, None])


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_int4_lies_in_memory_as_documented(rows: int, cols: int, group: int, zeros: bool) -> None:
    q, scales, zero_points = random_int4(rows, cols, group, zeros)
    weight = empty(4, rows, cols, group, zeros)
    reference.pack_int4(q, scales, zero_points, weight)
    values = torch.zeros((rows, cols))
    for row in range(rows):
        for col in range(row % 7, cols, 7):
            byte = int(weight.data[row // 16, col // 8, row % 16, col % 4])
            nibble = byte >> 4 if col % 8 >= 4 else byte & 15
            zero = 8 if weight.zeros is None else int(weight.zeros[row // 16, col // group, row % 16])
            values[row, col] = (nibble - zero) * float(weight.scales[row // 16, col // group, row % 16])
    seen = values != 0
    assert torch.equal(reference.dequantize(weight)[seen], values[seen])
    assert torch.equal(reference.unpack(weight), q)
    assert not weight.scales.transpose(1, 2).reshape(-1, weight.scales.shape[1])[rows:].any()


def test_rounding_stays_within_half_a_step_and_keeps_zeros() -> None:
    weight = torch.randn(33, 200) * torch.logspace(-3, 1, 33)[:, None]
    weight[:, 5] = 0
    weight[3] = 0
    q, scales = reference.round_to_int8(weight)
    restored = scales[:, None] * q
    assert ((restored - weight).abs() <= scales[:, None] * 0.5001).all()
    assert not restored[:, 5].any()
    assert not restored[3].any()
    for group in GROUPS:
        packed = empty(4, 33, 200, group, zeros=True)
        q, scales, zeros = reference.round_to_int4(weight, group)
        reference.pack_int4(q, scales, zeros, packed)
        restored = reference.dequantize(packed)
        steps = scales.float().repeat_interleave(group, 1)[:, :200]
        # One step at the range's ends, where the zero point's own rounding adds to the value's.
        assert ((restored - weight).abs() <= steps * 1.01).all()
        assert ((restored - weight).abs() <= steps * 0.51).float().mean() > 0.97
        assert not restored[:, 5].any()
        assert not restored[3].any()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_linear_layer_rounds_its_input_and_multiplies(bits: int) -> None:
    weight, x = torch.randn(48, 160), torch.randn(3, 5, 160) * torch.logspace(-2, 2, 5)[:, None]
    packed = empty(bits, 48, 160, 0 if bits == 8 else 32, zeros=bits == 4)
    if bits == 8:
        reference.pack_int8(*reference.round_to_int8(weight), packed)
    else:
        reference.pack_int4(*reference.round_to_int4(weight, 32), packed)
    bias = torch.randn(48)
    result = reference.linear(x, packed, bias)
    exact = F.linear(x, weight, bias)
    error = (result - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert (error < (0.02 if bits == 8 else 0.12)).all()
    # What the weights' rounding leaves is the input's own: at most half of 1/127 of a block's largest.
    kept = F.linear(x, reference.dequantize(packed), bias)
    assert ((result - kept).norm(dim=-1) / kept.norm(dim=-1) < 0.02).all()
    assert torch.equal(reference.linear(x[1], packed, bias), result[1])


def test_act_order_says_which_input_a_column_takes() -> None:
    q, scales, _ = random_int4(16, 64, 32, zeros=False)
    weight = empty(4, 16, 64, 32)
    reference.pack_int4(q, scales, None, weight)
    order = torch.randperm(64).int()
    x = torch.randn(2, 64)
    ordered = replace(weight, order=order)
    assert torch.equal(reference.linear(x, ordered, None), reference.linear(x[:, order], weight, None))


def test_whole_panels_can_be_viewed_apart() -> None:
    q, scales, zeros = random_int4(50, 96, 32, zeros=True)
    weight = empty(4, 50, 96, 32, zeros=True)
    reference.pack_int4(q, scales, zeros, weight)
    assert torch.equal(reference.unpack(weight.panels(16, 50)), q[16:])
    assert weight.panels(0, 32).data.data_ptr() == weight.data.data_ptr()
    with pytest.raises(KernelArgumentError, match="whole panels"):
        weight.panels(0, 20)


@pytest.mark.parametrize(("bits", "group", "zeros"), [(3, 32, False), (4, 0, False), (4, 48, False), (8, 0, True)])
def test_formats_that_do_not_exist_are_refused(bits: int, group: int, zeros: bool) -> None:
    with pytest.raises(KernelArgumentError, match=r"format for|has no groups"):
        tensor_layout(bits, 16, 64, group, zeros=zeros)


def test_tensors_that_do_not_fit_are_refused() -> None:
    weight = empty(4, 16, 64, 32, zeros=True)
    for broken in (
        {"rows": 17},
        {"cols": 65},
        {"group": 64},
        {"data": weight.data[:, ::2]},
        {"zeros": weight.scales},
    ):
        with pytest.raises(KernelArgumentError, match="must be contiguous"):
            replace(weight, **broken)
