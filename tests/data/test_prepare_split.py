"""The rows that `prepare` puts into the test split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_fmp.data.errors import DataError
from torchrec_fmp.data.raw.table import RawChunk, RawColumns, RawTable
from torchrec_fmp.data.splitting import ColumnSplit, OrderSplit, RowSplit, SeedSplit, TimeSplit


class MemoryTable(RawTable):
    """A table in memory, read in chunks of any size."""

    def __init__(self, columns: dict[str, list], chunk_rows: int) -> None:
        self._rows = pa.RecordBatch.from_pydict(columns)
        self._chunk_rows = chunk_rows

    @property
    def columns(self) -> RawColumns:
        return RawColumns("t", (), ("a",))

    @property
    def files(self) -> Sequence[str]:
        return ["memory"]

    def scan(self, names: Sequence[str]) -> Iterator[RawChunk]:
        for start in range(0, self._rows.num_rows, self._chunk_rows):
            rows = self._rows.slice(start, self._chunk_rows).select(list(names))
            yield RawChunk("memory", start, start, rows)


def rows_drawn(split: RowSplit, table: RawTable) -> list[bool]:
    chunks = table.scan(["t"])
    return [row for chunk in chunks for row in split.test_mask(chunk).to_pylist()]


@settings(deadline=None)
@given(rows=st.integers(1, 200), fraction=st.floats(0.01, 0.99), chunk_rows=st.integers(1, 50))
def test_order_split_takes_the_last_rows_rounded_to_the_nearest_number(rows, fraction, chunk_rows):
    table = MemoryTable({"t": list(range(rows))}, chunk_rows)
    tested = rows_drawn(OrderSplit.fit(table, fraction), table)
    assert tested == sorted(tested)
    assert abs(sum(tested) - fraction * rows) <= 0.5


@settings(deadline=None)
@given(
    times=st.lists(st.integers(-5, 30), min_size=1, max_size=100),
    fraction=st.floats(0.01, 0.99),
    chunk_rows=st.integers(1, 50),
)
def test_time_split_never_trains_on_rows_later_than_a_test_row(times, fraction, chunk_rows):
    table = MemoryTable({"t": times}, chunk_rows)
    tested = rows_drawn(TimeSplit.fit(table, "t", fraction), table)
    train = [time for time, test in zip(times, tested, strict=True) if not test]
    test = [time for time, test in zip(times, tested, strict=True) if test]
    assert max(train) < min(test, default=99)
    assert len(test) <= fraction * len(times) + 0.5
    # One more time value would have made the test split exceed its share.
    assert len(test) + train.count(max(train)) >= fraction * len(times) - 0.5


@pytest.mark.parametrize(
    "times",
    [
        ["9", "10", "8", "11"],
        ["9.5", "10.25", "8", "11"],
        ["2024-09-30", "2024-10-01", "2023-12-31", "2024-10-02"],
        [1_700_000_000_000_000_001, 1_700_000_000_000_000_002, 0, 1_700_000_000_000_000_003],
    ],
    ids=["integers", "numbers", "dates", "nanoseconds"],
)
def test_time_split_compares_times_by_the_type_of_their_values(times):
    table = MemoryTable({"t": times}, 2)
    tested = rows_drawn(TimeSplit.fit(table, "t", 0.5), table)
    assert tested == [False, True, False, True]


@pytest.mark.parametrize("missing", [None, ""])
def test_time_split_refuses_a_row_without_a_time(missing):
    table = MemoryTable({"t": ["1", "2", missing]}, 2)
    with pytest.raises(DataError, match="memory, column 't', row 2: no time"):
        TimeSplit.fit(table, "t", 0.5)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(-5, 2**70), chunk_rows=st.integers(1, 300))
def test_seed_split_draws_the_same_rows_for_any_chunk_size(seed, chunk_rows):
    columns = {"t": list(range(300))}
    split = SeedSplit(seed, 0.3)
    whole = rows_drawn(split, MemoryTable(columns, 300))
    assert rows_drawn(split, MemoryTable(columns, chunk_rows)) == whole


def test_seed_split_draws_the_requested_share_and_seeds_are_independent():
    table = MemoryTable({"t": [0] * 100_000}, 65_536)
    first, second = (np.array(rows_drawn(SeedSplit(seed, 0.2), table)) for seed in (0, 1))
    assert first.mean() == pytest.approx(0.2, abs=0.005)
    assert (first & second).mean() == pytest.approx(0.04, abs=0.003)
    assert (first[1:] & first[:-1]).mean() == pytest.approx(0.04, abs=0.003)


def test_column_split_tests_on_the_rows_marked_1():
    table = MemoryTable({"t": [0, 1, 1, 0]}, 3)
    assert rows_drawn(ColumnSplit("t"), table) == [False, True, True, False]


def test_column_split_refuses_values_other_than_0_and_1():
    table = MemoryTable({"t": [0, 1, 1, 0, 2]}, 3)
    with pytest.raises(DataError, match="memory, column 't', row 4: 2 is not 0 or 1"):
        rows_drawn(ColumnSplit("t"), table)
