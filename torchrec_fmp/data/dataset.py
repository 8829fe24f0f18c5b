"""The two interfaces that every data set implements: `Source` (rows) and `Dataset` (splits)."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from torchrec_fmp.data.errors import DataError
from torchrec_fmp.data.schema import Schema

Split = Literal["train", "test"]


@dataclass(frozen=True)
class RowGroup:
    """A run of rows that can be read without reading the rows before it.

    Args:
        file: file name as given by the user, or a stand-in for error messages.
        index: position of the group in its file.
        first_row: row number within the file (from 0) of the group's first row.
        rows: number of rows.
    """

    file: str
    index: int
    first_row: int
    rows: int


class Source(abc.ABC):
    """Rows in a fixed order, divided into row groups whose sizes are known without reading them."""

    @property
    @abc.abstractmethod
    def row_groups(self) -> Sequence[RowGroup]:
        """All row groups, in order."""

    @abc.abstractmethod
    def read(self, group: RowGroup) -> pa.Table:
        """The group's rows: one column per column of the schema, by name.

        Called from several threads at once. Returns the same rows every time.

        Raises:
            DataError: if the rows cannot be read; names file, row and column.
        """

    @property
    def total_rows(self) -> int:
        """Number of rows in all row groups."""
        return sum(group.rows for group in self.row_groups)

    def row_numbers(self, group: RowGroup) -> npt.NDArray[np.int64]:
        """The row number within the file of each of the group's rows, for messages."""
        return np.arange(group.first_row, group.first_row + group.rows)

    def read_whole(self, group: RowGroup) -> pa.Table:
        """Reads the group and checks that it has as many rows as announced.

        Raises:
            DataError: if the number of rows differs, or they cannot be read.
        """
        table = self.read(group)
        if table.num_rows != group.rows:
            raise DataError(
                f"{table.num_rows} rows were read, but {group.rows} were announced",
                file=group.file,
                row=group.first_row,
                remedy="Do not change files while they are being read.",
            )
        return table


@dataclass(frozen=True)
class PlantedTruth:
    """The known role of each synthetic feature; every feature is named exactly once."""

    signal: tuple[str, ...]
    redundant: tuple[str, ...]
    noise: tuple[str, ...]


class Dataset(abc.ABC):
    """A data set, named under `data` in a config: a schema and a source of rows for each split."""

    @property
    @abc.abstractmethod
    def schema(self) -> Schema:
        """Columns and cardinalities, which determine the model's table sizes."""

    @abc.abstractmethod
    def source(self, split: Split) -> Source:
        """The rows of one split."""

    @property
    def truth(self) -> PlantedTruth | None:
        """The planted truth, known for synthetic data only."""
        return None
