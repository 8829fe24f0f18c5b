"""Parquet files as data sets: the output of `torchrec-fmp prepare`, and any other files."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_fmp import paths
from torchrec_fmp.data.columns import check_columns
from torchrec_fmp.data.dataset import Dataset, RowGroup, Source, Split
from torchrec_fmp.data.errors import DataError
from torchrec_fmp.data.schema import Schema, SparseColumn


class ParquetSource(Source):
    """The rows of Parquet files, in file order.

    Every file's footer is read at construction. Rows are read only in `read`, and only the columns
    of the schema.

    Args:
        files: Parquet files.
        schema: columns to read.

    Raises:
        DataError: if a file does not exist, is not Parquet, is truncated, or has no rows, or if a
            column is missing or has an unreadable type.
    """

    def __init__(self, files: Sequence[str], schema: Schema) -> None:
        self._schema = schema
        self._opened = threading.local()
        self._row_groups = [group for file in files for group in self._inspect(file)]

    @property
    def row_groups(self) -> Sequence[RowGroup]:
        return self._row_groups

    def read(self, group: RowGroup) -> pa.Table:
        try:
            return self._open(group.file).read_row_group(
                group.index, columns=list(self._schema.columns), use_threads=False
            )
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"row group {group.index} cannot be read: {error}",
                file=group.file,
                row=group.first_row,
                remedy="The file is truncated or damaged: write it again.",
            ) from error

    def _inspect(self, file: str) -> Iterable[RowGroup]:
        opened = self._open(file)
        check_columns(opened.schema_arrow, self._schema, file)
        if not opened.metadata.num_rows:
            raise DataError("the file has no rows", file=file, remedy="Leave it out.")
        first_row = 0
        for index in range(opened.num_row_groups):
            rows = opened.metadata.row_group(index).num_rows
            yield RowGroup(file=file, index=index, first_row=first_row, rows=rows)
            first_row += rows

    def _open(self, file: str) -> pq.ParquetFile:
        # A ParquetFile serves one thread. Each thread keeps only its last one, since the footers
        # of many files are large, and most reads continue in the same file.
        if getattr(self._opened, "name", None) != file:
            try:
                self._opened.file = pq.ParquetFile(paths.local_path(file))
            except (pa.ArrowException, OSError) as error:
                raise DataError(
                    f"the file cannot be opened as Parquet: {error}",
                    file=file,
                    remedy="Check that it exists, is whole and is a Parquet file.",
                ) from error
            self._opened.name = file
        opened: pq.ParquetFile = self._opened.file
        return opened


class PreparedDataset(Dataset):
    """A directory written by `torchrec-fmp prepare`: schema.json, train/, test/.

    Args:
        path: directory to read.

    Raises:
        FileNotFoundError: if there is no schema.json in the directory.
        ValueError: if schema.json is not a schema.
    """

    def __init__(self, path: str) -> None:
        schema = paths.join(path, "schema.json")
        if not paths.exists(schema):
            raise FileNotFoundError(
                f"{schema} does not exist. "
                f"Create {path} with `torchrec-fmp prepare ... --out {path}`"
            )
        self._path = path
        self._schema = Schema.load(schema)

    @property
    def schema(self) -> Schema:
        return self._schema

    def source(self, split: Split) -> Source:
        return ParquetSource(
            paths.list_files(paths.join(self._path, split), ".parquet"), self._schema
        )


class ParquetDataset(Dataset):
    """Any Parquet files, with explicitly named columns.

    Sparse columns hold ids below `num_embeddings`, strings that are hashed into `num_embeddings`
    buckets, or lists of either.

    Args:
        train: files, or directories of .parquet files, to train on.
        test: files or directories to evaluate on.
        label: column of labels, 0 or 1.
        dense: columns of numbers.
        sparse: sparse column name -> its num_embeddings.

    Raises:
        ValueError: if a column is named twice, or num_embeddings is below 1.
    """

    def __init__(
        self,
        train: list[str],
        test: list[str],
        label: str,
        dense: list[str],
        sparse: dict[str, int],
    ) -> None:
        columns = tuple(SparseColumn(name, rows) for name, rows in sparse.items())
        self._schema = Schema(label=label, dense=tuple(dense), sparse=columns)
        self._paths: dict[Split, list[str]] = {"train": train, "test": test}

    @property
    def schema(self) -> Schema:
        return self._schema

    def source(self, split: Split) -> Source:
        files = [file for path in self._paths[split] for file in paths.list_files(path, ".parquet")]
        return ParquetSource(files, self._schema)
