"""Packed weights, element by element against the layout of mma.m16n8k16's first operand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuseline.kernels.errors import KernelArgumentError
from fuseline.kernels.packed import PackedWeight, pack, unpack


def numbered(rows: int, cols: int) -> torch.Tensor:
    return torch.arange(rows * cols, dtype=torch.int16).view(rows, cols)


def test_each_lane_finds_its_fragment_s_registers() -> None:
    weight = numbered(32, 48)
    packed = pack(weight)
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
    packed = pack(weight)
    assert packed.is_contiguous()
    assert torch.equal(unpack(packed, rows), weight)
    assert not unpack(packed, packed.shape[0] * 16)[rows:].any()


@pytest.mark.parametrize(("rows", "group_rows"), [(48, 48), (256, 64), (384, 128)])
def test_halves_of_a_group_are_rows_g_and_g_plus_8_of_units(rows: int, group_rows: int) -> None:
    weight = numbered(rows, 16)
    packed = pack(weight, group_rows)
    assert torch.equal(unpack(packed, rows, group_rows), weight)
    interleaved = unpack(packed, rows)
    for group in range(0, rows, group_rows):
        for element in range(group_rows // 2):
            row = group + 16 * (element // 8) + element % 8
            assert torch.equal(interleaved[row], weight[group + element])
            assert torch.equal(interleaved[row + 8], weight[group + group_rows // 2 + element])


def test_shapes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(KernelArgumentError, match="multiple"):
        pack(numbered(16, 24))
    for rows, group_rows in ((24, 24), (48, 32)):
        with pytest.raises(KernelArgumentError, match="groups"):
            pack(numbered(rows, 16), group_rows)


def test_a_packed_weight_takes_the_memory_of_the_rows() -> None:
    weight = numbered(32, 48)
    rows = weight.clone()
    packed = PackedWeight.of(weight, 32)
    assert packed.data.data_ptr() == weight.data_ptr()
    assert torch.equal(packed.unpack(), rows)
    assert (packed.shape, packed.dtype, packed.device) == ((32, 48), torch.int16, weight.device)


@pytest.mark.parametrize(("rows", "keep"), [(32, True), (37, False)])
def test_a_packed_weight_leaves_rows_alone_that_others_use_or_that_are_too_few(rows: int, keep: bool) -> None:
    weight = numbered(rows, 16)
    packed = PackedWeight.of(weight, keep=keep)
    assert torch.equal(weight, numbered(rows, 16))
    assert torch.equal(packed.unpack(), weight)
