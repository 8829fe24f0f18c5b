"""Avazu's click-through-rate logs: CSV with a header, plain or compressed."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pyarrow as pa

from torchrec_fmp.data.raw.delimited import CSV, DelimitedTable
from torchrec_fmp.data.raw.table import RawChunk, RawColumns, RawTable

SITE_AND_DEVICE = (
    "C1 banner_pos site_id site_domain site_category app_id app_domain app_category "
    "device_id device_ip device_model device_type device_conn_type "
    "C14 C15 C16 C17 C18 C19 C20 C21"
).split()


class AvazuTable(RawTable):
    """Rows of Avazu files; `hour` (YYMMDDHH) gives hour_of_day and weekday (0 is Monday).

    `id` is unique to each row and is left out.
    """

    def __init__(self, files: Sequence[str]) -> None:
        columns = RawColumns(
            label="click",
            dense=(),
            sparse=("hour_of_day", "weekday", *SITE_AND_DEVICE),
            time="hour",
        )
        self._table = DelimitedTable(files, CSV, columns)

    @property
    def columns(self) -> RawColumns:
        return self._table.columns

    @property
    def files(self) -> Sequence[str]:
        return self._table.files

    def scan(self, names: Sequence[str]) -> Iterator[RawChunk]:
        derived = {"hour_of_day", "weekday"}.intersection(names)
        stored = [name for name in names if name not in derived]
        if derived and "hour" not in stored:
            stored.append("hour")
        for chunk in self._table.scan(stored):
            yield _with_time_of_day(chunk, names) if derived else chunk


def _with_time_of_day(chunk: RawChunk, names: Sequence[str]) -> RawChunk:
    hours = chunk.rows["hour"].dictionary_encode()
    times = [_parse_hour(chunk, text) for text in hours.dictionary.to_pylist()]
    columns = dict(zip(chunk.rows.schema.names, chunk.rows.columns, strict=True))
    columns["hour_of_day"] = pa.array([str(time.hour) for time in times]).take(hours.indices)
    columns["weekday"] = pa.array([str(time.weekday()) for time in times]).take(hours.indices)
    rows = pa.RecordBatch.from_pydict({name: columns[name] for name in names})
    return replace(chunk, rows=rows)


def _parse_hour(chunk: RawChunk, text: str) -> datetime.datetime:
    try:
        return datetime.datetime.strptime(text, "%y%m%d%H")
    except ValueError as error:
        raise chunk.error(
            f"{text!r} is not an hour",
            column="hour",
            index=chunk.rows["hour"].index(text).as_py(),
            remedy="Write it as YYMMDDHH.",
        ) from error
