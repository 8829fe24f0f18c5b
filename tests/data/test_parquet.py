from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchrec_fmp.data.dataset import RowGroup
from torchrec_fmp.data.errors import DataError
from torchrec_fmp.data.parquet import ParquetDataset, ParquetSource, PreparedDataset
from torchrec_fmp.data.reader import Reader
from torchrec_fmp.data.schema import Schema, SparseColumn

SCHEMA = Schema(label="y", dense=("d",), sparse=(SparseColumn("s", 1000), SparseColumn("m", 10)))


def write(path: Path, first: int, rows: int, rows_per_group: int = 4, **columns: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = range(first, first + rows)
    content: dict[str, Any] = {
        "unused": ["x"] * rows,
        "m": [["a"] * (row % 3) for row in numbers],
        "s": pa.array(numbers, pa.int32()),
        "d": pa.array(numbers, pa.float32()),
        "y": pa.array([row % 2 for row in numbers], pa.int8()),
    }
    pq.write_table(pa.table(content | columns), path, row_group_size=rows_per_group)
    return str(path)


def test_row_groups_of_all_files_are_listed_with_their_place(tmp_path: Path) -> None:
    files = [write(tmp_path / "1.parquet", 0, 6), write(tmp_path / "2.parquet", 6, 3)]
    assert ParquetSource(files, SCHEMA).row_groups == [
        RowGroup(files[0], 0, 0, 4),
        RowGroup(files[0], 1, 4, 2),
        RowGroup(files[1], 0, 0, 3),
    ]


def test_only_the_columns_of_the_schema_are_read(tmp_path: Path) -> None:
    source = ParquetSource([write(tmp_path / "1.parquet", 0, 6)], SCHEMA)
    assert set(source.read(source.row_groups[0]).column_names) == set(SCHEMA.columns)


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_number_of_workers_does_not_change_the_rows_read(tmp_path: Path, shuffle: bool) -> None:
    files = [write(tmp_path / f"{n}.parquet", 20 * n, 20, 3) for n in range(4)]

    def ids(workers: int) -> list[int]:
        source = ParquetSource(files, SCHEMA)
        reader = Reader(source, SCHEMA, shuffle=shuffle, workers=workers)
        return [i for b in reader.batches(8) for i in b.sparse_features["s"].values().tolist()]

    assert ids(0) == ids(1) == ids(4)
    assert sorted(ids(0)) == list(range(80))


def test_a_prepared_directory_gives_its_schema_and_both_splits(tmp_path: Path) -> None:
    SCHEMA.save(str(tmp_path / "schema.json"))
    write(tmp_path / "train" / "b.parquet", 6, 3)
    write(tmp_path / "train" / "a.parquet", 0, 6)
    write(tmp_path / "test" / "a.parquet", 9, 2)
    dataset = PreparedDataset(str(tmp_path))
    assert dataset.schema == SCHEMA
    rows = {
        split: Reader(dataset.source(split), dataset.schema).rows for split in ("train", "test")
    }
    assert rows == {"train": 9, "test": 2}
    first = next(Reader(dataset.source("train"), SCHEMA).batches(9))
    assert first.dense_features[:, 0].tolist() == list(range(9))


def test_any_parquet_file_is_read_by_column_name(tmp_path: Path) -> None:
    write(tmp_path / "part" / "1.parquet", 0, 6)
    dataset = ParquetDataset(
        train=[str(tmp_path / "part")],
        test=[str(tmp_path / "part" / "1.parquet")],
        label="y",
        dense=["d"],
        sparse={"s": 1000, "m": 10},
    )
    assert dataset.schema == SCHEMA
    batch = next(Reader(dataset.source("test"), SCHEMA).batches(6))
    assert batch.sparse_features["m"].lengths().tolist() == [0, 1, 2, 0, 1, 2]
    assert dataset.source("train").row_groups[0].rows == 4


def test_a_column_missing_from_one_file_is_an_error_before_any_row_is_read(tmp_path: Path) -> None:
    files = [write(tmp_path / "1.parquet", 0, 6), str(tmp_path / "2.parquet")]
    pq.write_table(pa.table({"y": [0], "d": [0.0], "m": [["a"]]}), files[1])
    with pytest.raises(DataError, match="2.parquet, column 's': there is no such column"):
        ParquetSource(files, SCHEMA)


def test_a_column_of_the_wrong_type_is_an_error_before_any_row_is_read(tmp_path: Path) -> None:
    file = write(tmp_path / "1.parquet", 0, 2, d=["a", "b"])
    with pytest.raises(DataError, match="1.parquet, column 'd': the column's type is string"):
        ParquetSource([file], SCHEMA)


def test_a_bad_value_is_reported_with_its_row_in_the_file(tmp_path: Path) -> None:
    files = [write(tmp_path / "1.parquet", 0, 6)]
    files.append(write(tmp_path / "2.parquet", 6, 6, s=[1, 2, 3, 4, 5, 1000]))
    reader = Reader(ParquetSource(files, SCHEMA), SCHEMA, shuffle=True)
    with pytest.raises(DataError, match=r"2.parquet, column 's', row 5: id out of range \(1000\)"):
        list(reader.batches(2))


@pytest.mark.parametrize("content", [b"", b"y,d,s\n0,0.5,1\n", b"PAR1 and then nothing"])
def test_a_file_that_is_not_parquet_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "1.parquet").write_bytes(content)
    with pytest.raises(DataError, match="1.parquet: the file cannot be opened as Parquet"):
        ParquetSource([str(tmp_path / "1.parquet")], SCHEMA)


def test_a_truncated_file_is_an_error(tmp_path: Path) -> None:
    file = Path(write(tmp_path / "1.parquet", 0, 600))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match="1.parquet: the file cannot be opened as Parquet"):
        ParquetSource([str(file)], SCHEMA)


def test_a_file_damaged_in_the_middle_is_an_error_that_names_the_row(tmp_path: Path) -> None:
    file = Path(write(tmp_path / "1.parquet", 0, 600, 300))
    content = file.read_bytes()
    start = pq.ParquetFile(file).metadata.row_group(1).column(0).dictionary_page_offset
    file.write_bytes(content[:start] + bytes(len(content) - start - 3000) + content[-3000:])
    source = ParquetSource([str(file)], SCHEMA)
    with pytest.raises(DataError, match="1.parquet, row 300: row group 1 cannot be read"):
        list(Reader(source, SCHEMA).batches(10))


def test_a_file_without_rows_is_an_error(tmp_path: Path) -> None:
    files = [write(tmp_path / "1.parquet", 0, 6), write(tmp_path / "2.parquet", 0, 1)]
    pq.write_table(pq.read_table(files[1]).slice(0, 0), files[1])
    with pytest.raises(DataError, match="2.parquet: the file has no rows"):
        ParquetSource(files, SCHEMA)
