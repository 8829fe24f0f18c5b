"""Delimited text (CSV, TSV), plain or compressed; every value is read as a string."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.csv as pa_csv

from torchrec_fmp import paths
from torchrec_fmp.data.errors import DataError
from torchrec_fmp.data.raw.table import RawChunk, RawColumns, RawTable, read_chunks, require_columns

# pyarrow reads 32 blocks ahead, so this bounds the memory to 256 MiB plus a few blocks.
_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class Dialect:
    """The format of a delimited file.

    Args:
        delimiter: single character.
        quoted: whether "..." may enclose delimiters and line ends.
        names: column names, if the file has no header line.
    """

    delimiter: str
    quoted: bool
    names: tuple[str, ...] | None = None


CSV = Dialect(",", quoted=True)
TSV = Dialect("\t", quoted=False)


class DelimitedTable(RawTable):
    """Rows of delimited files with the same columns.

    Files named *.gz, *.bz2, *.zst are decompressed while they are read. Empty lines are skipped.
    Neither they nor the header count as rows.

    Raises:
        DataError: if a file is empty or lacks a column.
    """

    def __init__(self, files: Sequence[str], dialect: Dialect, columns: RawColumns) -> None:
        self._files = files
        self._dialect = dialect
        self._columns = columns
        self._names = {file: read_names(file, dialect) for file in files}

    @property
    def columns(self) -> RawColumns:
        return self._columns

    @property
    def files(self) -> Sequence[str]:
        return self._files

    def scan(self, names: Sequence[str]) -> Iterator[RawChunk]:
        position = 0
        for file in self._files:
            require_columns(file, self._names[file], names)
            for chunk in read_chunks(file, self._batches(file, names), position):
                yield chunk
                position = chunk.position + chunk.rows.num_rows

    def _batches(self, file: str, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        # Types are not left to pyarrow's inference: it looks at the first block only, and would
        # turn the value "007" into 7.
        convert = pa_csv.ConvertOptions(
            include_columns=list(names),
            column_types=dict.fromkeys(names, pa.string()),
        )
        with _open(file, self._dialect, convert) as reader:
            yield from reader


def read_names(file: str, dialect: Dialect) -> tuple[str, ...]:
    """The file's column names, from its header line or from the dialect.

    Raises:
        DataError: if the file is empty or its first block cannot be read.
    """
    try:
        with _open(file, dialect, pa_csv.ConvertOptions()) as reader:
            return tuple(reader.schema.names)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"cannot be read: {error}".rstrip("."),
            file=file,
            remedy="Name a delimited text file, plain or compressed.",
        ) from error


@contextlib.contextmanager
def _open(
    file: str, dialect: Dialect, convert: pa_csv.ConvertOptions
) -> Iterator[pa_csv.CSVStreamingReader]:
    refused: list[pa_csv.InvalidRow] = []

    def refuse(row: pa_csv.InvalidRow) -> str:
        # pyarrow swallows a handler's exceptions, so the error is raised below.
        refused.append(row)
        return "error"

    try:
        with pa_csv.open_csv(
            pa.input_stream(paths.local_path(file), compression="detect"),
            # A threaded reader does not know the number of a rejected row.
            read_options=pa_csv.ReadOptions(
                column_names=dialect.names, block_size=_BLOCK_BYTES, use_threads=False
            ),
            parse_options=pa_csv.ParseOptions(
                delimiter=dialect.delimiter,
                quote_char='"' if dialect.quoted else False,
                newlines_in_values=dialect.quoted,
                invalid_row_handler=refuse,
            ),
            convert_options=convert,
        ) as reader:
            yield reader
    except pa.ArrowInvalid as error:
        if not refused:
            raise
        raise DataError(
            f"{refused[0].actual_columns} fields instead of {refused[0].expected_columns}",
            file=file,
            row=refused[0].number - (1 if dialect.names else 2),
            remedy="Check the delimiter, and that the file is whole.",
        ) from error
