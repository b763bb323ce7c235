from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from fuseline.collectives.kv_transfer.intervals import IntervalSet

RANGES = st.tuples(st.integers(0, 30), st.integers(0, 30))


@given(st.lists(RANGES, max_size=20), RANGES)
def test_behaves_like_a_set_of_integers(added: list[tuple[int, int]], asked: tuple[int, int]) -> None:
    intervals, model = IntervalSet(), set[int]()
    for start, end in added:
        intervals.add(start, end)
        model.update(range(start, end))
    missing = set(range(*asked)) - model
    gaps = intervals.missing(*asked)
    assert [token for gap in gaps for token in range(*gap)] == sorted(missing)
    assert all(first[1] < second[0] for first, second in pairwise(gaps)), "gaps are maximal"
    assert intervals.covers(*asked) == (not missing)


def test_growth_in_order_stays_one_interval() -> None:
    intervals = IntervalSet()
    for start in range(0, 1000, 10):
        intervals.add(start, start + 10)
    assert intervals.missing(-5, 1005) == [(-5, 0), (1000, 1005)]
    assert len(intervals._starts) == 1
