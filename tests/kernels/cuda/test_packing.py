"""Packed weights, element by element against the layout of mma.m16n8k16's first operand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuseline.kernels.cuda import packing
from fuseline.kernels.errors import KernelArgumentError


def numbered(rows: int, cols: int) -> torch.Tensor:
    return torch.arange(rows * cols).view(rows, cols)


def test_each_lane_finds_its_fragment_s_registers() -> None:
    weight = numbered(32, 48)
    packed = packing.pack(weight)
    assert packed.shape == (2, 3, 32, 8)
    for unit in range(2):
        for step in range(3):
            for lane in range(32):
                row, col = 16 * unit + lane // 4, 16 * step + 2 * (lane % 4)
                registers = [(row, col), (row + 8, col), (row, col + 8), (row + 8, col + 8)]
                expected = [weight[r, c + i] for r, c in registers for i in (0, 1)]
                assert packed[unit, step, lane].tolist() == [int(value) for value in expected]


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 70), steps=st.integers(1, 5))
def test_unpacking_gives_the_weight_back(rows: int, steps: int) -> None:
    weight = numbered(rows, 16 * steps)
    packed = packing.pack(weight)
    assert packed.is_contiguous()
    assert torch.equal(packing.unpack(packed, rows), weight)
    assert not packing.unpack(packed, packed.shape[0] * 16)[rows:].any()


def test_gate_and_up_of_an_element_are_rows_g_and_g_plus_8_of_a_unit() -> None:
    gate_up = numbered(48, 16)
    interleaved = packing.interleave_gate_up(gate_up)
    assert torch.equal(packing.separate_gate_up(interleaved), gate_up)
    for element in range(24):
        row = 16 * (element // 8) + element % 8
        assert torch.equal(interleaved[row], gate_up[element])
        assert torch.equal(interleaved[row + 8], gate_up[24 + element])


@pytest.mark.parametrize(("pack", "shape"), [(packing.pack, (16, 24)), (packing.interleave_gate_up, (24, 16))])
def test_shapes_that_do_not_divide_are_refused(pack: object, shape: tuple[int, int]) -> None:
    assert callable(pack)
    with pytest.raises(KernelArgumentError, match="multiple"):
        pack(torch.zeros(shape))
