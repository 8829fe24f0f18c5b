"""The interface that every raw format implements: `RawTable`, read in `RawChunk`s."""

from __future__ import annotations

import abc
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from torchrec_fmp import paths
from torchrec_fmp.data.errors import DataError


@dataclass(frozen=True)
class RawColumns:
    """The roles of the columns of a raw table.

    Args:
        label: column of 0 and 1.
        dense: columns of numbers.
        sparse: columns of values that become ids.
        multivalued: sparse columns whose rows are lists of values.
        time: column for splitting the rows by time, if the format has one.

    Raises:
        ValueError: if a column has two roles, or there is no sparse column.
    """

    label: str
    dense: tuple[str, ...]
    sparse: tuple[str, ...]
    multivalued: frozenset[str] = frozenset()
    time: str | None = None

    def __post_init__(self) -> None:
        roles = Counter((self.label, *self.dense, *self.sparse))
        repeated = [name for name, count in roles.items() if count > 1]
        if repeated:
            raise ValueError(f"columns named more than once among label, dense, sparse: {repeated}")
        if not self.sparse:
            raise ValueError("no column is left for sparse features; there is no table to train")


@dataclass(frozen=True)
class RawChunk:
    """Consecutive rows of one file.

    Args:
        file: file name as given by the user.
        first_row: the chunk's first row, counted from 0 within the file.
        position: the chunk's first row, counted from 0 over all files.
        rows: requested columns.
    """

    file: str
    first_row: int
    position: int
    rows: pa.RecordBatch

    def error(self, problem: str, *, column: str, index: int, remedy: str) -> DataError:
        """An error that names row `index` of this chunk by its place in the file."""
        return DataError(
            problem, file=self.file, column=column, row=self.first_row + index, remedy=remedy
        )


class RawTable(abc.ABC):
    """Rows of raw files in a fixed order; memory does not grow with the files."""

    @property
    @abc.abstractmethod
    def columns(self) -> RawColumns:
        """The roles of the columns."""

    @property
    @abc.abstractmethod
    def files(self) -> Sequence[str]:
        """The files that hold the rows, in order."""

    @abc.abstractmethod
    def scan(self, names: Sequence[str]) -> Iterator[RawChunk]:
        """All rows, in order, with these columns only.

        Raises:
            DataError: if the rows cannot be read; names file and, where known, row and column.
        """

    def count_rows(self) -> int:
        """Number of rows."""
        return sum(chunk.rows.num_rows for chunk in self.scan([self.columns.label]))


def list_inputs(inputs: Sequence[str]) -> list[str]:
    """The files of `inputs`; each input is a file or a directory.

    Raises:
        FileNotFoundError: if an input does not exist.
        DataError: if an input is a directory without files.
    """
    files = []
    for path in inputs:
        found = paths.list_files(path)
        if not found:
            raise DataError(
                "the directory has no files", file=path, remedy="Name the data's files."
            )
        files += found
    return files


def require_columns(file: str, present: Sequence[str], wanted: Sequence[str]) -> None:
    """Raises a `DataError` unless `file` has each wanted column exactly once."""
    occurrences = Counter(present)
    for name in wanted:
        if occurrences[name] != 1:
            problem = "no such column" if not occurrences[name] else "several columns of this name"
            raise DataError(
                problem, file=file, column=name, remedy=f"The file's columns are {list(present)}."
            )


def read_chunks(file: str, batches: Iterator[pa.RecordBatch], position: int) -> Iterator[RawChunk]:
    """Numbers the rows of one file's batches; pyarrow's errors become `DataError`."""
    row = 0
    while True:
        try:
            batch = next(batches, None)
        except (pa.ArrowException, OSError) as error:
            problem = f"cannot be read after row {row}: {error}".rstrip(".")
            remedy = "The file may be truncated or damaged: fetch it again."
            raise DataError(problem, file=file, remedy=remedy) from error
        if batch is None:
            return
        yield RawChunk(file, row, position + row, batch)
        row += batch.num_rows
