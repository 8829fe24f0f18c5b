"""Invalid raw files: every error names the file, the place, the value and the remedy."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchrec_fmp.data.errors import DataError
from torchrec_fmp.data.prepare import PrepareConfig, prepare
from torchrec_fmp.data.raw import delimited

CRITEO_LINE = "\t".join(["1", *["3"] * 13, *["c0ffee"] * 26]) + "\n"


def csv_config(tmp_path: Path, text: str | bytes, **options) -> PrepareConfig:
    file = tmp_path / "raw.csv"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    options = {"label": "y", "dense": ["d"], "sparse": ["a"]} | options
    return PrepareConfig(format="csv", inputs=[str(file)], out=str(tmp_path / "out"), **options)


def parquet_config(tmp_path: Path, *tables: pa.Table, **options) -> PrepareConfig:
    files = []
    for part, table in enumerate(tables):
        files.append(str(tmp_path / f"part-{part}.parquet"))
        pq.write_table(table, files[-1])
    out = str(tmp_path / "out")
    return PrepareConfig(format="parquet", inputs=files, out=out, label="y", **options)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            "0,1,x\n2,1,x\n",
            r"raw.csv, column 'y', row 1: '2' is not 0 or 1. A label must be 0 or 1",
        ),
        ("0,1,x\n,1,x\n", r"raw.csv, column 'y', row 1: '' is not 0 or 1"),
        ("0,1,x\nyes,1,x\n", r"raw.csv, column 'y', row 1: 'yes' is not a number"),
        ("0,1,x\n0,1,x\n0,nan,x\n", r"raw.csv, column 'd', row 2: 'nan' is not a finite float32"),
        ("0,1,x\n0,-inf,x\n", r"raw.csv, column 'd', row 1: '-inf' is not a .* or leave the field"),
        (
            "0,1,x\n0,1O,x\n",
            r"raw.csv, column 'd', row 1: '1O' is not a number. Repair the row, or",
        ),
        ("0,1,x\n0,1\n", r"raw.csv, row 1: 2 fields instead of 3. Check the delimiter"),
        ("0,1,x\n0,1,x,z\n", r"raw.csv, row 1: 4 fields instead of 3"),
        ("", r"raw.csv: no rows. Name files that hold data"),
        ("0,1,x\n", r"raw.csv: split order leaves the test split empty. Change split"),
    ],
)
def test_errors_for_bad_rows_name_file_column_and_row(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        prepare(csv_config(tmp_path, "y,d,a\n" + rows))
    assert os.listdir(tmp_path) == ["raw.csv"]


def test_row_numbers_count_from_the_start_of_the_file_beyond_its_first_block(tmp_path, monkeypatch):
    monkeypatch.setattr(delimited, "_BLOCK_BYTES", 64)
    for name, last in (("0.csv", "0,1,x"), ("1.csv", "0,oops,x")):
        (tmp_path / name).write_text("y,d,a\n" + "0,1,x\n" * 100 + last + "\n")
    config = PrepareConfig(
        format="csv",
        inputs=[str(tmp_path / "0.csv"), str(tmp_path / "1.csv")],
        out=str(tmp_path / "out"),
        label="y",
        dense=["d"],
    )
    with pytest.raises(DataError, match=r"1.csv, column 'd', row 100: 'oops' is not a number"):
        prepare(config)


def test_a_line_with_too_few_fields_is_found_beyond_the_first_block(tmp_path, monkeypatch):
    monkeypatch.setattr(delimited, "_BLOCK_BYTES", 1 << 10)
    file = tmp_path / "train.txt"
    file.write_text(CRITEO_LINE * 100 + "1\t2\n" + CRITEO_LINE)
    config = PrepareConfig(format="criteo", inputs=[str(file)], out=str(tmp_path / "out"))
    with pytest.raises(DataError, match=r"train.txt, row 100: 2 fields instead of 40"):
        prepare(config)


@pytest.mark.parametrize("option", ["label", "dense", "sparse", "split_column"])
def test_the_error_for_a_missing_column_lists_the_columns_of_the_file(tmp_path, option):
    options = {"label": "nope", "dense": ["nope"], "sparse": ["nope"], "split_column": "nope"}
    chosen = {option: options[option]}
    if option == "split_column":
        chosen["split"] = "column"
    message = r"raw.csv, column 'nope': no such column. The file's columns are \['y', 'd', 'a'\]"
    with pytest.raises(DataError, match=message):
        prepare(csv_config(tmp_path, "y,d,a\n0,1,x\n1,2,z\n", **chosen))


def test_a_duplicate_column_name_is_refused(tmp_path):
    with pytest.raises(DataError, match="column 'a': several columns of this name"):
        prepare(csv_config(tmp_path, "y,d,a,a\n0,1,x,x\n"))


def test_a_column_cannot_have_two_roles(tmp_path):
    with pytest.raises(ValueError, match=r"named more than once among label, dense, .*\['a'\]"):
        prepare(csv_config(tmp_path, "y,d,a\n0,1,x\n", dense=["a"]))


def test_a_table_without_sparse_columns_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no column is left for sparse features"):
        prepare(csv_config(tmp_path, "y,d\n0,1\n", sparse=None))


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="raw.csv: cannot be read: Empty CSV file"):
        prepare(csv_config(tmp_path, ""))


def test_an_empty_directory_is_refused(tmp_path):
    (tmp_path / "raw").mkdir()
    config = PrepareConfig(format="criteo", inputs=[str(tmp_path / "raw")], out=str(tmp_path / "o"))
    with pytest.raises(DataError, match="raw: the directory has no files"):
        prepare(config)


def test_a_missing_file_is_named(tmp_path):
    config = PrepareConfig(format="criteo", inputs=["absent.txt"], out=str(tmp_path / "out"))
    with pytest.raises(FileNotFoundError, match="absent.txt"):
        prepare(config)


def test_text_that_is_not_utf8_is_refused(tmp_path):
    with pytest.raises(DataError, match="raw.csv: cannot be read.*invalid UTF8"):
        prepare(csv_config(tmp_path, b"y,d,a\n0,1,\xff\xfe\n1,1,x\n"))


@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_a_truncated_gzip_file_is_refused(tmp_path, kept):
    whole = gzip.compress((CRITEO_LINE * 1000).encode())
    file = tmp_path / "train.gz"
    file.write_bytes(whole[: int(kept * len(whole))])
    config = PrepareConfig(format="criteo", inputs=[str(file)], out=str(tmp_path / "out"))
    with pytest.raises(DataError, match="train.gz"):
        prepare(config)
    assert os.listdir(tmp_path) == ["train.gz"]


def test_a_truncated_parquet_file_is_refused(tmp_path):
    config = parquet_config(tmp_path, pa.table({"y": [0, 1], "a": [1, 2]}))
    os.truncate(config.inputs[0], 200)
    with pytest.raises(
        DataError, match=r"part-0.parquet: not a whole Parquet file.*fetch it again"
    ):
        prepare(config)


def test_a_damaged_parquet_page_is_refused(tmp_path):
    config = parquet_config(tmp_path, pa.table({"y": [0, 1] * 500, "a": list(range(1000))}))
    with open(config.inputs[0], "r+b") as file:
        file.seek(4)
        file.write(b"\xff" * 64)
    with pytest.raises(DataError, match=r"part-0.parquet: cannot be read after row 0"):
        prepare(config)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_dense_numbers_that_float32_cannot_hold_are_refused(tmp_path, value):
    table = pa.table({"y": [0, 1], "d": [1.0, value], "a": [1, 2]})
    config = parquet_config(tmp_path, table, dense=["d"], log_dense=False)
    with pytest.raises(DataError, match="part-0.parquet, column 'd', row 1: .* not a finite float"):
        prepare(config)


def test_a_column_of_lists_in_one_file_and_single_values_in_another_is_refused(tmp_path):
    one = pa.table({"y": [0, 1], "a": [[1], [2]]})
    other = pa.table({"y": [0, 1], "a": [1, 2]})
    with pytest.raises(DataError, match="part-1.parquet, column 'a': lists in one file and single"):
        prepare(parquet_config(tmp_path, one, other))


def test_nested_values_are_refused(tmp_path):
    table = pa.table({"y": [0, 1], "a": [[[1]], [[2]]]})
    with pytest.raises(
        DataError, match="column 'a': values of type list<.* Sparse columns must hold"
    ):
        prepare(parquet_config(tmp_path, table, split="seed", test_fraction=0.5))


def test_a_list_in_a_dense_column_is_refused(tmp_path):
    table = pa.table({"y": [0, 1], "d": [[1], [2]], "a": [1, 2]})
    with pytest.raises(DataError, match=r"column 'd', row 0: \[1\] is not a number"):
        prepare(parquet_config(tmp_path, table, dense=["d"]))


def test_an_invalid_hour_is_refused(tmp_path):
    header = "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,"
    header += "app_category,device_id,device_ip,device_model,device_type,device_conn_type,"
    header += "C14,C15,C16,C17,C18,C19,C20,C21\n"
    rows = "".join(f"1,0,{hour}{',s' * 21}\n" for hour in ("14102100", "14102199"))
    file = tmp_path / "train.csv"
    file.write_text(header + rows)
    config = PrepareConfig(format="avazu", inputs=[str(file)], out=str(tmp_path / "out"))
    with pytest.raises(DataError, match="column 'hour', row 1: '14102199' is not an hour. Write"):
        prepare(config)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "release: holds neither ratings.dat nor ratings.csv"),
        (
            {"ratings.dat": "1::9::5::1\n", "movies.dat": "1::A (1990)::X\n"},
            "column 'movie_id', row 0: '9' is not in .*movies.dat",
        ),
        (
            {"ratings.dat": "1::1::5::1\n", "movies.dat": "1::A (1990)\n"},
            "movies.dat, row 0: 2 fields instead of 3",
        ),
        ({"ratings.dat": "1::1::5::1\n", "movies.dat": ""}, "movies.dat: the file is empty"),
        (
            {"ratings.dat": "1::1::?::1\n", "movies.dat": "1::A (1990)::X\n"},
            "ratings.dat, column 'rating', row 0: '\\?' is not a number",
        ),
        (
            {"ratings.dat": "1::1::::1\n", "movies.dat": "1::A (1990)::X\n"},
            "ratings.dat, column 'rating', row 0: no rating",
        ),
    ],
)
def test_a_damaged_movielens_release_is_refused(tmp_path, files, message):
    release = tmp_path / "release"
    release.mkdir()
    for name, text in files.items():
        (release / name).write_text(text)
    config = PrepareConfig(format="movielens", inputs=[str(release)], out=str(tmp_path / "out"))
    with pytest.raises(DataError, match=message):
        prepare(config)
