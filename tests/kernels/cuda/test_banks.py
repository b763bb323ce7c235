"""The bank model against what is known of the hardware, and of the public kernels."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuseline.kernels.cuda.banks import WARP, fewest_passes, ldmatrix_passes, passes, swizzle_128b


@pytest.mark.parametrize(
    ("stride_words", "expected"), [(0, 1), (1, 1), (2, 2), (3, 1), (4, 4), (16, 16), (32, 32), (33, 1)]
)
def test_words_at_a_stride(stride_words: int, expected: int) -> None:
    assert passes([4 * stride_words * lane for lane in range(WARP)], 4) == expected


@pytest.mark.parametrize("access_bytes", [4, 8, 16])
def test_a_warp_reading_in_a_row_takes_the_fewest_passes(access_bytes: int) -> None:
    addresses = [access_bytes * lane for lane in range(WARP)]
    assert passes(addresses, access_bytes) == fewest_passes(addresses, access_bytes) == access_bytes // 4


def test_matrices_of_rows_128_bytes_apart_need_the_swizzle() -> None:
    rows = [128 * row for row in range(8)]
    assert ldmatrix_passes(rows) == 8
    assert ldmatrix_passes([swizzle_128b(address) for address in rows]) == 1


def test_matrices_of_padded_rows_need_none() -> None:
    assert ldmatrix_passes([(1024 + 16) * row for row in range(8)] * 4) == 4


def test_the_public_layout_is_eight_times_slower_than_it_could_be() -> None:
    """Lanes of a warp read 16 bytes of rows 128 bytes apart, eight lanes a row: 32 passes for 4 (kernels.md)."""
    plain = [128 * (lane // 1 % 32) for lane in range(WARP)]
    assert (passes(plain, 16), fewest_passes(plain, 16)) == (32, 4)
    assert passes([swizzle_128b(address) for address in plain], 16) == 4


@given(st.integers(0, 2**20))
def test_the_swizzle_undoes_itself_and_stays_in_its_eight_rows(address: int) -> None:
    assert swizzle_128b(swizzle_128b(address)) == address
    assert swizzle_128b(address) // 1024 == address // 1024


@given(st.lists(st.integers(0, 4095), min_size=WARP, max_size=WARP))
def test_passes_lie_between_the_words_a_pass_delivers_and_one_a_lane(words: list[int]) -> None:
    addresses = [4 * word for word in words]
    assert fewest_passes(addresses, 4) <= passes(addresses, 4) <= len(set(words))


def test_an_unaligned_access_is_refused() -> None:
    with pytest.raises(ValueError, match="no multiple"):
        passes([2], 4)
