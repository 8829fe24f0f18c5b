"""A source over tables in memory, one row group each."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from torchrec_fmp.data.dataset import RowGroup, Source


class TableSource(Source):
    """Remembers which row groups were read."""

    def __init__(self, tables: Sequence[pa.Table]) -> None:
        self.tables = tables
        self.read_indices: list[int] = []
        self._groups: list[RowGroup] = []
        first_row = 0
        for index, table in enumerate(tables):
            self._groups.append(RowGroup("memory", index, first_row, table.num_rows))
            first_row += table.num_rows

    @property
    def row_groups(self) -> Sequence[RowGroup]:
        return self._groups

    def read(self, group: RowGroup) -> pa.Table:
        self.read_indices.append(group.index)
        return self.tables[group.index]
