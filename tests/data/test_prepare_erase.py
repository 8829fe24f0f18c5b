"""`prepare` with ERASE's columns, row order and split, from small files in the raw formats."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.data.test_prepare_formats import (
    AVAZU_HEADER,
    criteo_line,
    read_column,
    read_values,
    write_ml_1m,
)
from tests.data.test_prepare_split import MemoryTable
from torchrec_fmp.data.errors import DataError
from torchrec_fmp.data.prepare import PrepareConfig, prepare
from torchrec_fmp.data.raw import delimited, permuted
from torchrec_fmp.data.raw.erase import erase_movielens_table
from torchrec_fmp.data.raw.permuted import PermutedTable, shuffled
from torchrec_fmp.data.raw.table import RawChunk, RawColumns, RawTable
from torchrec_fmp.data.splitting import OrderSplit


class Counted(RawTable):
    """A table of which only the number of rows is known."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    columns = RawColumns("t", (), ("a",))
    files = ("counted",)

    def scan(self, names: Sequence[str]) -> Iterator[RawChunk]:
        raise NotImplementedError

    def count_rows(self) -> int:
        return self.rows


def shuffled_positions(rows: int, chunk_rows: int) -> list[int]:
    table = shuffled(MemoryTable({"t": list(range(rows))}, chunk_rows), seed=43)
    return [row for chunk in table.scan(["t"]) for row in chunk.rows["t"].to_pylist()]


@pytest.mark.parametrize("chunk_rows", [1, 3, 10])
def test_the_shuffle_matches_pandas_for_any_chunk_size(chunk_rows):
    # Result of `DataFrame({"t": range(10)}).sample(frac=1, random_state=43)` in pandas 2.1.4.
    assert shuffled_positions(10, chunk_rows) == [3, 9, 6, 8, 2, 5, 1, 7, 0, 4]


def test_the_shuffle_of_as_many_rows_as_ml_1m_matches_pandas():
    positions = np.array(shuffled_positions(1_000_209, 400_000), "<i8")
    # Digest of the same shuffle in pandas 2.1.4.
    expected = "40a42f320ee5a35f11b595a9f6bc34b5bd58dd2e7bddd5f931e00624b615870c"
    assert hashlib.sha256(positions.tobytes()).hexdigest() == expected


def test_the_shuffle_is_numpys_legacy_choice_which_pandas_calls():
    chosen = np.random.RandomState(43).choice(777, 777, replace=False)
    assert shuffled_positions(777, 100) == chosen.tolist()


def test_an_error_names_a_shuffled_row_by_its_place_in_the_file():
    table = PermutedTable(MemoryTable({"t": [0, 1, 2, 3, 4]}, 2), np.array([3, 0, 4, 2, 1]))
    (chunk,) = table.scan(["t"])
    for index, row in enumerate([3, 0, 4, 2, 1]):
        error = chunk.error("bad", column="t", index=index, remedy="Repair it.")
        assert f"row {row}: bad" in str(error)


def test_more_rows_than_fit_into_memory_are_refused_with_the_limit(monkeypatch):
    monkeypatch.setattr(permuted, "_MOST_ROWS", 9)
    with pytest.raises(DataError, match=r"10 rows are too many(.|\n)*The limit is 9"):
        shuffled_positions(10, 5)


# MovieLens 1M, Criteo Kaggle, Avazu.
@pytest.mark.parametrize("rows", [1_000_209, 45_840_617, 40_428_967])
def test_the_split_matches_erase_for_the_sizes_of_its_data_sets(rows):
    split = OrderSplit.fit(Counted(rows), test_fraction=0.1, validation_fraction=0.2)
    assert (split.train_rows, split.test_start) == (int(rows * 0.7), int(rows * 0.9))


def test_validation_rows_are_in_neither_split():
    table = MemoryTable({"t": list(range(10))}, 3)
    split = OrderSplit.fit(table, 0.1, 0.2)
    masks = [split.masks(chunk) for chunk in table.scan(["t"])]
    train, test = (
        [row for mask in of_split for row in mask.to_pylist()]
        for of_split in zip(*masks, strict=True)
    )
    assert train == [True] * 7 + [False] * 3
    assert test == [False] * 9 + [True]


def test_criteo_integers_become_erase_buckets_and_missing_integers_a_value(tmp_path):
    integers = ["-3", "-1", "0", "1", "2", "3", "7", "20", "65535", ""]
    file = tmp_path / "train.txt"
    file.write_text("\n".join(criteo_line(0, i, "68fd1e64") for i in [*integers, "5"]))
    out = tmp_path / "out"
    schema = prepare(
        PrepareConfig(
            format="criteo",
            inputs=[str(file)],
            out=str(out),
            columns="erase",
            min_count=1,
            test_fraction=0.05,
        )
    )
    assert schema.dense == ()
    assert len(schema.sparse) == 39

    def bucket(x: float) -> str:
        """Bucket of `x` as in data/preprocess.py of ERASE."""
        return str(int(math.log(x) ** 2)) if x > 2 else str(int(x) - 2)

    expected = [bucket(float(i)) if i else "" for i in integers]
    assert read_values(out, "train", "I7") == expected
    assert read_values(out, "train", "C1") == ["68fd1e64"] * 10


def test_a_criteo_integer_that_is_not_finite_is_refused(tmp_path):
    file = tmp_path / "train.txt"
    file.write_text("\n".join(criteo_line(0, i, "a") for i in ("1", "inf")))
    options = {"format": "criteo", "columns": "erase", "test_fraction": 0.5}
    with pytest.raises(DataError, match=r"column 'I1', row 1: 'inf' is not finite"):
        prepare(PrepareConfig(inputs=[str(file)], out=str(tmp_path / "out"), **options))


def test_avazu_has_22_fields_including_the_hour(tmp_path):
    hours = ["14102100", "14102523", "14102523", "14102622"]
    lines = [f"{i}00,1,{hour}" + ",s" * 21 for i, hour in enumerate(hours)]
    file = tmp_path / "train.csv"
    file.write_text("\n".join([AVAZU_HEADER, *lines]) + "\n")
    out = tmp_path / "out"
    options = {"format": "avazu", "columns": "erase", "min_count": 1, "test_fraction": 0.25}
    schema = prepare(PrepareConfig(inputs=[str(file)], out=str(out), **options))
    assert len(schema.sparse) == 22 and schema.sparse_names[0] == "hour"
    assert read_values(out, "train", "hour") == hours[:3]
    assert read_values(out, "test", "hour") == [None]


def prepare_ml_1m(raw: Path, out: Path, **options) -> None:
    config = {"format": "movielens", "columns": "erase", "min_count": 1, "test_fraction": 0.25}
    prepare(PrepareConfig(inputs=[str(raw)], out=str(out), **config | options))


def test_movielens_keeps_the_fields_of_its_files_and_genres_as_one_value(tmp_path):
    write_ml_1m(tmp_path)
    out = tmp_path / "out"
    prepare_ml_1m(tmp_path, out)
    fields = "user_id movie_id timestamp title genres gender age occupation zip".split()
    assert pq.read_schema(out / "train" / "part-00000.parquet").names == ["label", *fields]
    assert read_values(out, "train", "title") == [
        "Star Wars: Episode IV - A New Hope (1977)",
        "Caf\xe9 au lait",
        "Star Wars: Episode IV - A New Hope (1977)",
    ]
    assert read_values(out, "train", "timestamp") == ["978300760", "978302109", "978309999"]
    assert read_values(out, "test", "genres") == [None]
    assert read_column(out, "train", "label") == [1, 0, 0]


def test_movielens_rows_are_in_the_order_of_a_merge_by_an_older_pandas(tmp_path):
    write_ml_1m(tmp_path)
    ratings = [(1, 30), (1, 10), (1, 20), (3, 50), (3, 40), (2, 40), (2, 20), (2, 30)]
    ratings += [(4, 10), (4, 50), (5, 20), (5, 30)]
    lines = [f"{user}::{movie}::5::{i}" for i, (user, movie) in enumerate(ratings)]
    (tmp_path / "ratings.dat").write_text("\n".join(lines))
    table = erase_movielens_table(str(tmp_path), 3.0)
    places = [t for chunk in table.scan(["timestamp"]) for t in chunk.rows["timestamp"].to_pylist()]
    # Order of `pd.merge(pd.merge(ratings, movies), users)` in pandas 2.1.4.
    assert [int(place) for place in places] == [0, 1, 2, 7, 6, 5, 11, 10, 8, 9, 3, 4]


def test_a_shuffled_split_is_written_in_shuffled_order_for_any_block_size(tmp_path, monkeypatch):
    file = tmp_path / "raw.csv"
    file.write_text("y,a\n" + "".join(f"{i % 2},v{i}\n" for i in range(50)))
    order = np.random.RandomState(43).permutation(50)
    for block_bytes in (1 << 20, 64):
        monkeypatch.setattr(delimited, "_BLOCK_BYTES", block_bytes)
        out = tmp_path / f"out{block_bytes}"
        options = {"split": "shuffle", "seed": 43, "min_count": 1, "validation_fraction": 0.2}
        prepare(PrepareConfig(format="csv", inputs=[str(file)], out=str(out), label="y", **options))
        assert read_values(out, "train", "a") == [f"v{i}" for i in order[:35]]
        assert read_column(out, "test", "y") == [i % 2 for i in order[45:]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 0.9}, "leave rows to train on"),
        ({"validation_fraction": -0.1}, "it must be at least 0"),
        ({"validation_fraction": 0.2, "split": "seed"}, "cannot be set with split seed"),
        ({"split": "shuffle", "seed": -1}, "split shuffle takes 0 to 4294967295"),
        ({"format": "csv", "label": "y", "columns": "erase"}, "it must be own for format csv"),
    ],
)
def test_contradictory_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PrepareConfig(**{"format": "criteo", "inputs": ["train.txt"], "out": "out"} | options)
