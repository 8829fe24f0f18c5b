"""Criteo, Avazu and MovieLens with the columns of ERASE's benchmark.

ERASE (arXiv:2403.12660; Applied-Machine-Learning-Lab/ERASE, data/preprocess.py and
utils/datasets.py at 2201b88) turns every column into one categorical field.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from torchrec_fmp.data.raw.avazu import SITE_AND_DEVICE
from torchrec_fmp.data.raw.conversion import to_numbers
from torchrec_fmp.data.raw.criteo import criteo_table
from torchrec_fmp.data.raw.delimited import CSV, DelimitedTable
from torchrec_fmp.data.raw.movielens import MovieLensTable
from torchrec_fmp.data.raw.permuted import Order, PermutedTable
from torchrec_fmp.data.raw.table import RawChunk, RawColumns, RawTable


class EraseCriteoTable(RawTable):
    """39 fields: an integer x becomes the value floor(log(x)^2) if x > 2, else x - 2.

    A missing integer is a separate value, as in ERASE.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self._table = criteo_table(files)
        columns = self._table.columns
        self._integers = columns.dense
        self._columns = RawColumns(columns.label, (), (*columns.dense, *columns.sparse))

    @property
    def columns(self) -> RawColumns:
        return self._columns

    @property
    def files(self) -> Sequence[str]:
        return self._table.files

    def scan(self, names: Sequence[str]) -> Iterator[RawChunk]:
        for chunk in self._table.scan(names):
            columns = {
                name: _buckets(chunk, name) if name in self._integers else chunk.rows[name]
                for name in names
            }
            yield replace(chunk, rows=pa.RecordBatch.from_pydict(columns))


def _buckets(chunk: RawChunk, name: str) -> pa.StringArray:
    numbers = to_numbers(chunk, name)
    x = numbers.fill_null(0.0).to_numpy()
    finite = np.isfinite(x)
    if not finite.all():
        index = int(np.argmin(finite))
        value = chunk.rows[name][index].as_py()
        raise chunk.error(
            f"{value!r} is not finite", column=name, index=index, remedy="Leave the field empty."
        )
    buckets = np.where(x > 2, np.log(np.maximum(x, 1)) ** 2, np.trunc(x) - 2).astype(np.int64)
    return pa.array(buckets, mask=numbers.is_null().to_numpy(False)).cast(pa.string())


def erase_avazu_table(files: Sequence[str]) -> DelimitedTable:
    """22 fields, including `hour` (YYMMDDHH)."""
    return DelimitedTable(
        files, CSV, RawColumns("click", (), ("hour", *SITE_AND_DEVICE), time="hour")
    )


def erase_movielens_table(directory: str, rating_threshold: float) -> PermutedTable:
    """All columns of the files except the rating (9 in ml-1m), in the row order of ERASE's file.

    ERASE's file is `pd.merge(pd.merge(ratings, movies), users)`. Before version 2.2, pandas
    ordered an inner merge by the first occurrence of each key.
    """
    raw = MovieLensTable(directory, rating_threshold, as_written=True)
    schema = pa.schema([("user_id", pa.string()), ("movie_id", pa.string())])
    batches = [chunk.rows for chunk in raw.scan(schema.names)]
    ids = pa.Table.from_batches(batches, schema)
    by_movie = np.argsort(_first_seen(ids["movie_id"]), kind="stable")
    by_user = np.argsort(_first_seen(ids["user_id"].take(by_movie)), kind="stable")
    return PermutedTable(raw, by_movie[by_user])


def _first_seen(values: pa.ChunkedArray) -> Order:
    """(rows,), the rank of each row's value by first occurrence."""
    return values.combine_chunks().dictionary_encode().indices.to_numpy()
