from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from torchrec_fmp.data.division import Segment, divide, quotas

groups = st.lists(st.integers(0, 50), max_size=20)
world_sizes = st.integers(1, 9)


def shuffled(count: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


@given(groups, world_sizes, st.integers(0, 5))
def test_every_row_goes_to_exactly_one_rank(
    group_rows: list[int], world_size: int, seed: int
) -> None:
    division = divide(group_rows, world_size, shuffled(len(group_rows), seed))
    rows = [
        (segment.group, row)
        for segments in division
        for segment in segments
        for row in range(segment.start, segment.stop)
    ]
    assert sorted(rows) == [
        (group, row) for group, count in enumerate(group_rows) for row in range(count)
    ]


@given(groups, world_sizes)
def test_every_rank_gets_exactly_its_quota(group_rows: list[int], world_size: int) -> None:
    total = sum(group_rows)
    division = divide(group_rows, world_size, range(len(group_rows)))
    shares = [sum(segment.rows for segment in segments) for segments in division]
    assert shares == quotas(total, world_size)
    assert sum(shares) == total
    assert shares == sorted(shares, reverse=True) and shares[0] - shares[-1] <= 1


@given(groups, world_sizes)
def test_groups_are_cut_fewer_times_than_there_are_ranks(
    group_rows: list[int], world_size: int
) -> None:
    division = divide(group_rows, world_size, range(len(group_rows)))
    segments = sum(len(segments) for segments in division)
    cuts = segments - sum(rows > 0 for rows in group_rows)
    assert cuts <= world_size - 1


@given(groups, world_sizes, st.integers(0, 5))
def test_segments_keep_the_order(group_rows: list[int], world_size: int, seed: int) -> None:
    order = shuffled(len(group_rows), seed)
    for segments in divide(group_rows, world_size, order):
        positions = [order.index(segment.group) for segment in segments]
        assert positions == sorted(positions)


def test_groups_that_fill_the_quotas_are_not_cut() -> None:
    assert divide([10, 10, 10, 10], 2, [3, 2, 1, 0]) == [
        [Segment(3, 0, 10), Segment(1, 0, 10)],
        [Segment(2, 0, 10), Segment(0, 0, 10)],
    ]


def test_a_group_above_the_quota_is_cut_where_the_quota_ends() -> None:
    assert divide([7, 2], 2, [0, 1]) == [[Segment(0, 0, 5)], [Segment(0, 5, 7), Segment(1, 0, 2)]]
