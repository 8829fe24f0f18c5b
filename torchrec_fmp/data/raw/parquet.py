"""Parquet files with raw values: numbers, strings, or lists of either."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_fmp import paths
from torchrec_fmp.data.errors import DataError
from torchrec_fmp.data.raw.table import RawChunk, RawColumns, RawTable, read_chunks, require_columns

_BATCH_ROWS = 65_536


class ParquetTable(RawTable):
    """Rows of Parquet files with the same columns.

    Args:
        files: Parquet files, in row order.
        columns: roles of the columns; the files determine which sparse columns are multivalued.

    Raises:
        DataError: if a file is truncated, lacks a column, or has lists where the first file has
            single values.
    """

    def __init__(self, files: Sequence[str], columns: RawColumns) -> None:
        schemas = {file: read_schema(file) for file in files}
        for file, schema in schemas.items():
            require_columns(file, schema.names, (columns.label, *columns.dense, *columns.sparse))
        lists = {file: _lists(schema, columns.sparse) for file, schema in schemas.items()}
        multivalued = lists[files[0]]
        for file in files:
            for name in lists[file] ^ multivalued:
                raise DataError(
                    f"lists in one file and single values in another, {files[0]}",
                    file=file,
                    column=name,
                    remedy="Write the column the same way in all files.",
                )
        self._files = files
        self._schemas = schemas
        self._columns = RawColumns(columns.label, columns.dense, columns.sparse, multivalued)

    @property
    def columns(self) -> RawColumns:
        return self._columns

    @property
    def files(self) -> Sequence[str]:
        return self._files

    def scan(self, names: Sequence[str]) -> Iterator[RawChunk]:
        position = 0
        for file in self._files:
            require_columns(file, self._schemas[file].names, names)
            for chunk in read_chunks(file, _batches(file, names), position):
                yield chunk
                position = chunk.position + chunk.rows.num_rows


def read_schema(file: str) -> pa.Schema:
    """The file's Arrow schema.

    Raises:
        DataError: if the file is not a whole Parquet file.
    """
    try:
        return pq.read_schema(paths.local_path(file))
    except pa.ArrowInvalid as error:
        raise DataError(
            f"not a whole Parquet file: {error}".rstrip("."),
            file=file,
            remedy="The file may be truncated: fetch it again.",
        ) from error


def _batches(file: str, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(paths.local_path(file)) as parquet:
        for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, columns=list(names)):
            yield batch.select(list(names))


def _lists(schema: pa.Schema, names: Sequence[str]) -> frozenset[str]:
    return frozenset(name for name in names if is_list(schema.field(name).type))


def is_list(kind: pa.DataType) -> bool:
    """Whether the type is a list of any layout."""
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )
