"""MovieLens: ml-1m's and ml-10m's "::"-separated files, and the CSV releases."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from torchrec_fmp import paths
from torchrec_fmp.data.errors import DataError
from torchrec_fmp.data.raw.conversion import to_numbers
from torchrec_fmp.data.raw.delimited import CSV, DelimitedTable, Dialect
from torchrec_fmp.data.raw.table import RawChunk, RawColumns, RawTable

_RELEASE_YEAR = re.compile(r"\((\d{4})\)\s*$")


_RATINGS = ("user_id", "movie_id", "rating", "timestamp")
# The separator "::" is two delimiters, so an unnamed empty field lies between two fields.
_DAT = Dialect(":", quoted=False, names=("user_id", "", "movie_id", "", "rating", "", "timestamp"))
_CSV_NAMES = dict(zip(_RATINGS, ("userId", "movieId", "rating", "timestamp"), strict=True))
_USER_FEATURES = ("gender", "age", "occupation", "zip")


@dataclass(frozen=True)
class _Lookup:
    """Features of users or movies by their id."""

    file: str
    key: str
    ids: pa.StringArray
    features: dict[str, pa.Array]

    def join(self, chunk: RawChunk) -> dict[str, pa.Array]:
        """The features of the chunk's rows."""
        positions = pc.index_in(chunk.rows[self.key], self.ids)
        if positions.null_count:
            index = positions.is_null().index(True).as_py()
            raise chunk.error(
                f"{chunk.rows[self.key][index].as_py()!r} is not in {self.file}",
                column=self.key,
                index=index,
                remedy="Check that the files are whole and from one release.",
            )
        return {name: column.take(positions) for name, column in self.features.items()}


class MovieLensTable(RawTable):
    """One rating per row, joined with the movie (genres, release year) and, in ml-1m, the user.

    The label is whether the rating exceeds the threshold. `genres` is multivalued.

    Args:
        directory: directory of the release.
        rating_threshold: rating above which the label is positive.
        as_written: whether to keep the columns as in the files: with the timestamp, the title
            instead of the release year, and the genres of a movie as one value.

    Raises:
        DataError: if the directory is not a MovieLens release, or one of its files is damaged.
    """

    def __init__(self, directory: str, rating_threshold: float, as_written: bool = False) -> None:
        kind = _release_kind(directory)
        ratings, movies, users = (
            paths.join(directory, f"{name}.{kind}") for name in ("ratings", "movies", "users")
        )
        self._lookups = [_read_movies(movies, as_written)]
        if paths.exists(users):
            self._lookups.append(_read_users(users))
        self._columns = RawColumns(
            label="label",
            dense=(),
            sparse=(
                "user_id",
                "movie_id",
                *(("timestamp",) if as_written else ()),
                *(name for lookup in self._lookups for name in lookup.features),
            ),
            multivalued=frozenset() if as_written else frozenset(["genres"]),
            time="timestamp",
        )
        self._rating_threshold = rating_threshold
        self._stored = dict(zip(_RATINGS, _RATINGS, strict=True)) if kind == "dat" else _CSV_NAMES
        self._ratings = DelimitedTable([ratings], _DAT if kind == "dat" else CSV, self._columns)

    @property
    def columns(self) -> RawColumns:
        return self._columns

    @property
    def files(self) -> Sequence[str]:
        return self._ratings.files

    def scan(self, names: Sequence[str]) -> Iterator[RawChunk]:
        for stored in self._ratings.scan(list(self._stored.values())):
            chunk = replace(stored, rows=stored.rows.rename_columns(list(_RATINGS)))
            columns = dict(zip(_RATINGS, chunk.rows.columns, strict=True))
            for lookup in self._lookups:
                if not lookup.features.keys().isdisjoint(names):
                    columns |= lookup.join(chunk)
            if "label" in names:
                columns["label"] = pc.greater(_ratings(chunk), self._rating_threshold)
            rows = pa.RecordBatch.from_pydict({name: columns[name] for name in names})
            yield replace(chunk, rows=rows)


def _ratings(chunk: RawChunk) -> pa.DoubleArray:
    ratings = to_numbers(chunk, "rating")
    if ratings.null_count:
        index = ratings.is_null().index(True).as_py()
        raise chunk.error(
            "no rating", column="rating", index=index, remedy="Repair or remove the row."
        )
    return ratings


def _release_kind(directory: str) -> str:
    for kind in ("dat", "csv"):
        if paths.exists(paths.join(directory, f"ratings.{kind}")):
            return kind
    raise DataError(
        "holds neither ratings.dat nor ratings.csv",
        file=directory,
        remedy="Name the directory of an unpacked MovieLens release.",
    )


def _read_movies(file: str, as_written: bool) -> _Lookup:
    ids, titles, genres = _read_columns(file, 3)
    if as_written:
        columns = {"title": pa.array(titles, pa.string()), "genres": pa.array(genres, pa.string())}
        return _Lookup(file, "movie_id", pa.array(ids, pa.string()), columns)
    years = [match[1] if (match := _RELEASE_YEAR.search(title)) else "" for title in titles]
    features = {
        "genres": pa.array([text.split("|") for text in genres], pa.list_(pa.string())),
        "release_year": pa.array(years, pa.string()),
    }
    return _Lookup(file, "movie_id", pa.array(ids, pa.string()), features)


def _read_users(file: str) -> _Lookup:
    ids, *features = _read_columns(file, 1 + len(_USER_FEATURES))
    columns = (pa.array(values, pa.string()) for values in features)
    return _Lookup(
        file,
        "user_id",
        pa.array(ids, pa.string()),
        dict(zip(_USER_FEATURES, columns, strict=True)),
    )


def _read_columns(file: str, fields: int) -> list[tuple[str, ...]]:
    dat = file.endswith(".dat")
    with open(
        paths.local_path(file), encoding="latin-1" if dat else "utf-8", newline=None if dat else ""
    ) as text:
        lines = (line.rstrip("\n").split("::") for line in text) if dat else csv.reader(text)
        if not dat:
            next(lines, None)
        records = []
        for row, record in enumerate(lines):
            if len(record) != fields:
                raise DataError(
                    f"{len(record)} fields instead of {fields}",
                    file=file,
                    row=row,
                    remedy="Check that the file is whole.",
                )
            records.append(record)
    if not records:
        raise DataError("the file is empty", file=file, remedy="Fetch the release again.")
    return list(zip(*records, strict=True))
