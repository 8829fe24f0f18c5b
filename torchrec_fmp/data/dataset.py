"""The two interfaces behind which every data set lies: `Source` (rows) and `Dataset` (splits)."""

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
        file: the file as the user named it, or what stands for one in error messages.
        index: position of the group in its file.
        first_row: row of the file (from 0) at which the group starts.
        rows: number of rows.
    """

    file: str
    index: int
    first_row: int
    rows: int


class Source(abc.ABC):
    """Rows in a fixed order, cut into row groups whose sizes are known without reading them."""

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

    def row_numbers(self, group: RowGroup) -> npt.NDArray[np.int64]:
        """For each of the group's rows its row in the file, for messages."""
        return np.arange(group.first_row, group.first_row + group.rows)

    def read_whole(self, group: RowGroup) -> pa.Table:
        """The group's rows as `read` gives them, checked to be as many as were announced.

        Raises:
            DataError: if they are not, or cannot be read.
        """
        table = self.read(group)
        if table.num_rows != group.rows:
            raise DataError(
                f"{table.num_rows} rows were read where {group.rows} were announced",
                file=group.file,
                row=group.first_row,
                remedy="Do not change files that are being read.",
            )
        return table


@dataclass(frozen=True)
class PlantedTruth:
    """What a synthetic data set knows of its own features, each named exactly once."""

    signal: tuple[str, ...]
    redundant: tuple[str, ...]
    noise: tuple[str, ...]


class Dataset(abc.ABC):
    """What a config names under `data`: a schema and a source of rows for each split."""

    @property
    @abc.abstractmethod
    def schema(self) -> Schema:
        """Columns and cardinalities; the model's table sizes come from it."""

    @abc.abstractmethod
    def source(self, split: Split) -> Source:
        """The rows of one split."""

    @property
    def truth(self) -> PlantedTruth | None:
        """The planted truth, known for synthetic data only."""
        return None
