"""Parquet output of `prepare`: raw chunks become typed tables, and tables become row groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Executor
from types import TracebackType

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from torchrec_fmp import paths
from torchrec_fmp.data.raw.conversion import to_dense, to_labels, to_values
from torchrec_fmp.data.raw.table import RawChunk, RawColumns
from torchrec_fmp.data.vocabulary import OUT_OF_VOCABULARY, IdMap

_IDS = pa.list_(pa.int32())


class RowConverter:
    """Converts raw rows to schema rows: int8 label, float32 dense, int32 ids or lists of them."""

    def __init__(self, columns: RawColumns, id_maps: Mapping[str, IdMap], log_dense: bool) -> None:
        self._columns = columns
        self._id_maps = id_maps
        self._log_dense = log_dense
        self.schema = pa.schema(
            [
                (columns.label, pa.int8()),
                *((name, pa.float32()) for name in columns.dense),
                *((name, self._id_type(name)) for name in columns.sparse),
            ]
        )

    def convert(self, chunk: RawChunk, pool: Executor) -> pa.Table:
        """Converts the chunk, with its columns in parallel.

        Raises:
            DataError: if a value cannot be used; names file, column, row and value.
        """
        columns = pool.map(lambda name: self._convert_column(chunk, name), self.schema.names)
        return pa.table(list(columns), schema=self.schema)

    def _convert_column(self, chunk: RawChunk, name: str) -> pa.Array:
        if name == self._columns.label:
            return to_labels(chunk, name)
        if name in self._id_maps:
            sparse = to_values(chunk, name, name in self._columns.multivalued)
            ids = self._id_maps[name].ids(sparse.values)
            return ids if sparse.offsets is None else pa.ListArray.from_arrays(sparse.offsets, ids)
        return to_dense(chunk, name, self._log_dense)

    def _id_type(self, name: str) -> pa.DataType:
        return _IDS if name in self._columns.multivalued else pa.int32()


class SplitWriter:
    """Context manager that writes one split to a Parquet file in row groups of equal size.

    Args:
        path: file to create.
        schema: schema of the tables to write.
        row_group_rows: number of rows in every row group except the last.
    """

    def __init__(self, path: str, schema: pa.Schema, row_group_rows: int) -> None:
        self.rows = 0
        self._file = paths.open_path(path, "wb")
        self._writer = pq.ParquetWriter(self._file, schema, compression="zstd")
        self._row_group_rows = row_group_rows
        self._pending = schema.empty_table()
        self._ids: Counter[str] = Counter()
        self._unknown_ids: Counter[str] = Counter()

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None and self._pending.num_rows:
                self._writer.write_table(self._pending)
            self._writer.close()
        finally:
            self._file.close()

    def write(self, table: pa.Table) -> None:
        """Appends the rows."""
        self.rows += table.num_rows
        self._tally(table)
        pending = pa.concat_tables([self._pending, table])
        size = self._row_group_rows
        full_rows = pending.num_rows // size * size
        if full_rows:
            self._writer.write_table(pending.slice(0, full_rows), row_group_size=size)
        self._pending = pending.slice(full_rows)

    def out_of_vocabulary(self) -> dict[str, float]:
        """For each sparse column, the share of its values that are out of vocabulary."""
        return {
            name: self._unknown_ids[name] / total if total else 0.0
            for name, total in self._ids.items()
        }

    def _tally(self, table: pa.Table) -> None:
        for field in table.schema:
            if field.type not in (pa.int32(), _IDS):
                continue
            column = table[field.name]
            ids = pc.list_flatten(column) if field.type == _IDS else column
            self._ids[field.name] += len(ids)
            unknown = pc.sum(pc.equal(ids, OUT_OF_VOCABULARY), min_count=0).as_py()
            self._unknown_ids[field.name] += unknown
