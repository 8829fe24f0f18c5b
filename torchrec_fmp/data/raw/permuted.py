"""Rows of another table in another order, in memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from torchrec_fmp.data.errors import DataError
from torchrec_fmp.data.raw.table import RawChunk, RawColumns, RawTable

Order = npt.NDArray[np.int64]

_BATCH_ROWS = 65_536
# About 8 GB for Criteo's 40 columns.
_MOST_ROWS = 1 << 24


@dataclass(frozen=True)
class _PermutedChunk(RawChunk):
    """Rows that are consecutive only in the new order.

    Args:
        chunks: all chunks of the table in the old order.
        order: (rows,), position of each row in the old order.
    """

    chunks: Sequence[RawChunk]
    order: Order

    def error(self, problem: str, *, column: str, index: int, remedy: str) -> DataError:
        position = int(self.order[index])
        starts = [chunk.position for chunk in self.chunks]
        chunk = self.chunks[bisect_right(starts, position) - 1]
        return chunk.error(problem, column=column, index=position - chunk.position, remedy=remedy)


class PermutedTable(RawTable):
    """The rows of another table in another order; errors name a row by its place in the files.

    Each scan reads the requested columns of all rows into memory.

    Args:
        raw: table to reorder.
        order: position in `raw` of each row.
    """

    def __init__(self, raw: RawTable, order: Order) -> None:
        self._raw = raw
        self._order = order

    @property
    def columns(self) -> RawColumns:
        return self._raw.columns

    @property
    def files(self) -> Sequence[str]:
        return self._raw.files

    def scan(self, names: Sequence[str]) -> Iterator[RawChunk]:
        chunks = list(self._raw.scan(names))
        if not chunks:
            return
        table = pa.Table.from_batches([chunk.rows for chunk in chunks]).take(self._order)
        position = 0
        for rows in table.combine_chunks().to_batches(max_chunksize=_BATCH_ROWS):
            order = self._order[position : position + rows.num_rows]
            yield _PermutedChunk(chunks[0].file, position, position, rows, chunks, order)
            position += rows.num_rows


def shuffled(raw: RawTable, seed: int) -> PermutedTable:
    """Shuffles the rows like pandas' `DataFrame.sample(frac=1, random_state=seed)`.

    The order is `numpy.random.RandomState(seed).permutation`.

    Raises:
        DataError: if there are too many rows for memory.
    """
    rows = raw.count_rows()
    if rows > _MOST_ROWS:
        raise DataError(
            f"{rows:,} rows are too many to shuffle in memory",
            file=raw.files[0],
            remedy=f"The limit is {_MOST_ROWS:,}. Shuffle the files first, or split by seed.",
        )
    return PermutedTable(raw, np.random.RandomState(seed).permutation(rows))
