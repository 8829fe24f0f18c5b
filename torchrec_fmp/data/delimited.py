"""Delimited text files (CSV, TSV) as data sets."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import pyarrow as pa
import pyarrow.csv as pa_csv

from torchrec_fmp import paths
from torchrec_fmp.data.dataset import Dataset, RowGroup, Source, Split
from torchrec_fmp.data.errors import DataError
from torchrec_fmp.data.schema import Schema, SparseColumn

_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class _Block:
    names: tuple[str, ...]
    offset: int
    bytes: int


class CsvSource(Source):
    """The rows of delimited text files, in file order; a row group is about 16 MiB.

    A row is one line: blank lines and line breaks within quotes are errors. Row numbers in errors
    do not count the header.

    Args:
        files: UTF-8 text files.
        schema: columns to read.
        hashed: sparse columns of strings to hash; the others hold ids.
        delimiter: separator of the values in a line.
        columns: column names of the files; None if each file's first line is a header.
        block_bytes: minimum size of a row group, except the last of a file.

    Raises:
        DataError: if a file cannot be opened, has no rows, or lacks a column.
    """

    def __init__(
        self,
        files: Sequence[str],
        schema: Schema,
        *,
        hashed: Sequence[str] = (),
        delimiter: str = ",",
        columns: Sequence[str] | None = None,
        block_bytes: int = _BLOCK_BYTES,
    ) -> None:
        self._hashed = hashed
        self._delimiter = delimiter
        self._columns = columns
        self._block_bytes = block_bytes
        self._types = {
            **{name: pa.float64() for name in (schema.label, *schema.dense)},
            **{name: pa.string() if name in hashed else pa.int64() for name in schema.sparse_names},
        }
        self._blocks: dict[tuple[str, int], _Block] = {}
        self._row_groups = [group for file in files for group in self._inspect(file)]

    @property
    def row_groups(self) -> Sequence[RowGroup]:
        return self._row_groups

    def read(self, group: RowGroup) -> pa.Table:
        block = self._blocks[group.file, group.index]
        try:
            with open(paths.local_path(group.file), "rb") as file:
                file.seek(block.offset)
                text = file.read(block.bytes)
            table = pa_csv.read_csv(
                pa.BufferReader(text),
                # Arrow's errors name the row only when one thread reads one block.
                read_options=pa_csv.ReadOptions(
                    column_names=block.names, use_threads=False, block_size=block.bytes + 1
                ),
                parse_options=pa_csv.ParseOptions(delimiter=self._delimiter),
                convert_options=pa_csv.ConvertOptions(
                    column_types=self._types, include_columns=list(self._types)
                ),
            )
        except (pa.ArrowException, OSError) as error:
            self._fail(group, block, error)
        if table.num_rows != group.rows:
            raise DataError(
                f"{table.num_rows} rows were parsed from the {group.rows} lines that start here",
                file=group.file,
                row=group.first_row,
                remedy="Remove blank lines, and line breaks within quotes.",
            )
        for name in self._hashed:
            # Arrow lets a block end within quotes; elsewhere an unclosed quote changes the count.
            if "\n" in table.column(name)[-1].as_py():
                raise DataError(
                    "a quote is not closed on its line",
                    file=group.file,
                    column=name,
                    row=group.first_row + group.rows - 1,
                    remedy="Close it, and remove line breaks within quotes.",
                )
        return table

    def _fail(self, group: RowGroup, block: _Block, error: Exception) -> NoReturn:
        """Raises Arrow's error with the row number in the file instead of in the block."""
        message = str(error)
        row = re.search(r"Row #(\d+): ", message)
        column = re.search(r"CSV column #(\d+)", message)
        raise DataError(
            f"the text cannot be parsed: {message[row.end() if row else 0 :]}",
            file=group.file,
            column=block.names[int(column[1])] if column else None,
            row=group.first_row + (int(row[1]) - 1 if row else 0),
            remedy=(
                "Correct the line; check the delimiter and the column names. Name sparse columns "
                "of strings in `hashed`."
            ),
        ) from error

    def _inspect(self, file: str) -> Iterator[RowGroup]:
        try:
            with open(paths.local_path(file), "rb") as opened:
                names = self._columns
                if names is None:
                    header = opened.readline().decode("utf-8-sig").rstrip("\r\n")
                    names = next(csv.reader([header], delimiter=self._delimiter), [])
                self._check_names(file, names)
                offset, rows = opened.tell(), 0
                index = 0
                while text := opened.read(self._block_bytes):
                    text += opened.readline()
                    lines = text.count(b"\n") + (not text.endswith(b"\n"))
                    self._blocks[file, index] = _Block(tuple(names), offset, len(text))
                    yield RowGroup(file=file, index=index, first_row=rows, rows=lines)
                    offset, rows, index = offset + len(text), rows + lines, index + 1
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"the file cannot be read: {error}",
                file=file,
                remedy="Check that it exists and is UTF-8 text.",
            ) from error
        if not rows:
            raise DataError("the file has no rows", file=file, remedy="Leave it out.")

    def _check_names(self, file: str, names: Sequence[str]) -> None:
        if not names:
            raise DataError("the file is empty", file=file, remedy="Leave it out.")
        for column in self._types:
            if (count := names.count(column)) != 1:
                raise DataError(
                    f"{count} columns have this name" if count else "there is no such column",
                    file=file,
                    column=column,
                    remedy=(
                        f"Columns of the file: {', '.join(names)}. Files without a header need "
                        "`columns`."
                    ),
                )


class CsvDataset(Dataset):
    """Delimited text files with explicitly named columns.

    Args:
        train: files, or directories of files, to train on.
        test: files or directories to evaluate on.
        label: column of labels, 0 or 1.
        dense: columns of numbers.
        sparse: sparse column name -> its num_embeddings. The column holds ids below that number,
            or any strings if it is named in `hashed`.
        hashed: sparse columns of strings, which are hashed into num_embeddings buckets.
        delimiter: separator of the values in a line.
        columns: column names of the files; None if each file's first line is a header.

    Raises:
        ValueError: if a column is named twice, num_embeddings is below 1, or `hashed` names a
            column that is not in `sparse`.
    """

    def __init__(
        self,
        train: list[str],
        test: list[str],
        label: str,
        dense: list[str],
        sparse: dict[str, int],
        hashed: list[str] | None = None,
        delimiter: str = ",",
        columns: list[str] | None = None,
    ) -> None:
        sparse_columns = tuple(SparseColumn(name, rows) for name, rows in sparse.items())
        self._schema = Schema(label=label, dense=tuple(dense), sparse=sparse_columns)
        self._paths: dict[Split, list[str]] = {"train": train, "test": test}
        self._hashed = hashed or []
        self._delimiter = delimiter
        self._columns = columns
        if unknown := [name for name in self._hashed if name not in sparse]:
            raise ValueError(f"hashed names {unknown}, but sparse has only {list(sparse)}")

    @property
    def schema(self) -> Schema:
        return self._schema

    def source(self, split: Split) -> Source:
        return CsvSource(
            [file for path in self._paths[split] for file in paths.list_files(path)],
            self._schema,
            hashed=self._hashed,
            delimiter=self._delimiter,
            columns=self._columns,
        )
