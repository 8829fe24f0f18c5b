"""Chooses the raw rows of the test split by order, time, seed, or a column."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from torchrec_fmp.data.raw.conversion import to_test_mask, to_values
from torchrec_fmp.data.raw.table import RawChunk, RawTable
from torchrec_fmp.data.vocabulary import ValueCounts

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class RowSplit(abc.ABC):
    """Assigns rows to splits: a pure function of the row, however the rows are chunked."""

    @property
    @abc.abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Columns that the masks read."""

    @abc.abstractmethod
    def test_mask(self, chunk: RawChunk) -> pa.BooleanArray:
        """True for the chunk's rows that belong to the test split."""

    def masks(self, chunk: RawChunk) -> tuple[pa.BooleanArray, pa.BooleanArray]:
        """Masks of the chunk's rows that belong to the train split and to the test split."""
        test = self.test_mask(chunk)
        return pc.invert(test), test


@dataclass(frozen=True)
class OrderSplit(RowSplit):
    """The first rows are the train split, and the last rows are the test split.

    Args:
        train_rows: number of rows of the train split.
        test_start: position of the first test row; rows before it may be in neither split.
    """

    train_rows: int
    test_start: int
    columns: tuple[str, ...] = ()

    @staticmethod
    def fit(raw: RawTable, test_fraction: float, validation_fraction: float = 0.0) -> OrderSplit:
        """Counts the rows. Validation rows, rounded up in number, are in neither split."""
        rows = raw.count_rows()
        test_start = rows - round(test_fraction * rows)
        return OrderSplit(test_start - math.ceil(validation_fraction * rows), test_start)

    def test_mask(self, chunk: RawChunk) -> pa.BooleanArray:
        return pa.array(_positions(chunk) >= self.test_start)

    def masks(self, chunk: RawChunk) -> tuple[pa.BooleanArray, pa.BooleanArray]:
        return pa.array(_positions(chunk) < self.train_rows), self.test_mask(chunk)


@dataclass(frozen=True)
class TimeSplit(RowSplit):
    """Rows later than the last training time are the test split, wherever they are in the files.

    Times are compared as integers if all are integers, else as numbers, else as text (which is
    correct for ISO 8601). Rows with equal times are never separated, so the test split may be
    smaller than requested.

    Args:
        column: time column.
        last_train_time: time of the latest training row.
    """

    column: str
    last_train_time: pa.Scalar

    @staticmethod
    def fit(raw: RawTable, column: str, test_fraction: float) -> TimeSplit:
        """Reads the times of all rows; memory grows with the number of distinct times.

        Raises:
            DataError: if a row has no time.
        """
        counts = ValueCounts()
        for chunk in raw.scan([column]):
            counts.add(_times(chunk, column))
        table = counts.table()
        times = pc.cast(table["value"], _time_type(table["value"]))
        ordered = pa.table({"time": times, "count": table["count"]}).sort_by("time")
        rows_until = np.cumsum(ordered["count"].to_numpy())
        rows = int(rows_until[-1])
        last = int(np.searchsorted(rows_until, rows - round(test_fraction * rows)))
        return TimeSplit(column, ordered["time"][last])

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def test_mask(self, chunk: RawChunk) -> pa.BooleanArray:
        times = pc.cast(_times(chunk, self.column), self.last_train_time.type)
        return pc.greater(times, self.last_train_time)


@dataclass(frozen=True)
class SeedSplit(RowSplit):
    """Each row is in the test split with the same probability, by a hash of its position."""

    seed: int
    test_fraction: float
    columns: tuple[str, ...] = ()

    def test_mask(self, chunk: RawChunk) -> pa.BooleanArray:
        # Seeds are hashed first, so that neighbouring seeds do not give shifted copies.
        start = _splitmix64(np.array([self.seed & _MASK], np.uint64))
        bits = _splitmix64(_positions(chunk).astype(np.uint64) * np.uint64(_GOLDEN) + start)
        return pa.array((bits >> np.uint64(11)) * 2.0**-53 < self.test_fraction)


@dataclass(frozen=True)
class ColumnSplit(RowSplit):
    """A column gives the split of each row: 1 is test, 0 is train."""

    column: str

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def test_mask(self, chunk: RawChunk) -> pa.BooleanArray:
        return to_test_mask(chunk, self.column).cast(pa.bool_())


def _positions(chunk: RawChunk) -> npt.NDArray[np.int64]:
    return np.arange(chunk.position, chunk.position + chunk.rows.num_rows)


def _times(chunk: RawChunk, column: str) -> pa.LargeStringArray:
    times = to_values(chunk, column, multivalued=False).values
    index = pc.index(times, "").as_py()
    if index >= 0:
        raise chunk.error(
            "no time",
            column=column,
            index=index,
            remedy="A split by time needs a time in every row: repair it or choose another split.",
        )
    return times


def _time_type(times: pa.ChunkedArray) -> pa.DataType:
    for kind in (pa.int64(), pa.float64()):
        try:
            pc.cast(times, kind)
        except pa.ArrowInvalid:
            continue
        return kind
    return pa.large_string()


def _splitmix64(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The output function of splitmix64 (Steele, Lea, Flood 2014), modulo 2**64."""
    state = state + np.uint64(_GOLDEN)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
