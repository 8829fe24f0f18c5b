from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchrec_fmp.data.columns import hash_string
from torchrec_fmp.data.delimited import CsvDataset, CsvSource
from torchrec_fmp.data.errors import DataError
from torchrec_fmp.data.reader import Reader
from torchrec_fmp.data.schema import Schema, SparseColumn

SCHEMA = Schema(label="y", dense=("d",), sparse=(SparseColumn("s", 1000), SparseColumn("t", 50)))
HEADER = "unused,y,d,s,t\n"


def write(path: Path, text: str) -> str:
    path.write_bytes(text.encode())
    return str(path)


def lines(first: int, count: int, end: str = "\n") -> str:
    rows = range(first, first + count)
    return "".join(f"x,{row % 2},{row}.5,{row},{'v' * (row % 7)}{end}" for row in rows)


def read_all(source: CsvSource) -> None:
    for group in source.row_groups:
        source.read(group)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.integers(1, 200), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_every_line_is_one_row_for_any_block_size(
    tmp_path: Path, count: int, block_bytes: int, end: str, last_line_ends: bool
) -> None:
    text = HEADER.strip() + end + lines(0, count, end)
    file = write(tmp_path / "1.csv", text if last_line_ends else text.removesuffix(end))
    source = CsvSource([file], SCHEMA, hashed=["t"], block_bytes=block_bytes)
    ids: list[int] = []
    for group in source.row_groups:
        assert group.first_row == len(ids)
        ids += source.read(group).column("s").to_pylist()
        assert len(ids) == group.first_row + group.rows
    assert ids == list(range(count))


def test_a_block_exceeds_block_bytes_by_at_most_one_line(tmp_path: Path) -> None:
    file = write(tmp_path / "1.csv", HEADER + lines(0, 500))
    source = CsvSource([file], SCHEMA, hashed=["t"], block_bytes=256)
    longest = max(len(line) for line in lines(0, 500).splitlines())
    assert all(group.rows * 8 < 256 + longest for group in source.row_groups)


def test_files_without_a_header_are_read_with_given_columns_and_delimiter(tmp_path: Path) -> None:
    write(tmp_path / "train.tsv", "1\t0.5\t3\t\n0\tinf\t4\tb c\n")
    write(tmp_path / "test.tsv", "1\t0.5\t3\ta\n")
    dataset = CsvDataset(
        train=[str(tmp_path / "train.tsv")],
        test=[str(tmp_path / "test.tsv")],
        label="y",
        dense=["d"],
        sparse={"s": 1000, "t": 50},
        hashed=["t"],
        delimiter="\t",
        columns=["y", "d", "s", "t"],
    )
    reader = Reader(dataset.source("train"), dataset.schema, bad_input="replace")
    batch = next(reader.batches(2))
    assert batch.labels.tolist() == [1, 0]
    assert batch.dense_features.tolist() == [[0.5], [0.0]]
    assert batch.sparse_features["s"].values().tolist() == [3, 4]
    hashes = [hash_string(b"", 50), hash_string(b"b c", 50)]
    assert batch.sparse_features["t"].values().tolist() == hashes
    assert dataset.source("test").row_groups[0].rows == 1


def test_a_header_with_a_byte_order_mark_and_quotes_is_read(tmp_path: Path) -> None:
    file = write(tmp_path / "1.csv", '\ufeffy,"d",s,"t"\n1,2,3,"a,b"\n')
    source = CsvSource([file], SCHEMA, hashed=["t"])
    assert source.read(source.row_groups[0]).column("t").to_pylist() == ["a,b"]


GOOD = lines(0, 5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x,1,2,3\n", "row 5: the text cannot be parsed: Expected 5 columns, got 4"),
        ("x,1,2,3,a,b\n", "row 5: the text cannot be parsed: Expected 5 columns, got 6"),
        ("x,1,2,abc,a\n", "column 's', row 5: the text cannot be parsed: .*'abc'.*`hashed`"),
        ("x,1,2,3.5,a\n", "column 's', row 5: the text cannot be parsed: .*'3.5'"),
        ("x,1,two,3,a\n", "column 'd', row 5: the text cannot be parsed: .*'two'"),
        ("x,yes,2,3,a\n", "column 'y', row 5: the text cannot be parsed: .*'yes'"),
        ("x,1,2,,a\n", "column 's', row 5: null"),
        ("x,1,,3,a\n", "column 'd', row 5: null"),
        ("x,1,nan,3,a\n", "column 'd', row 5: n"),
        ("x,,2,3,a\n", "column 'y', row 5: the label is null"),
        ("x,1,2,1000,a\n", r"column 's', row 5: id out of range \(1000\)"),
        ("\n", "rows were parsed from the"),
        ('x,1,2,3,"a\nb"\n', "rows were parsed from the|Expected 5|row 5: a quote is not closed"),
        ('x,1,2,3,"a\n', "Expected|rows were parsed|column 't', row 5: a quote is not closed"),
    ],
)
@pytest.mark.parametrize("block_bytes", [1, 40, 1 << 20])
def test_the_error_for_a_bad_line_names_its_location(
    tmp_path: Path, line: str, message: str, block_bytes: int
) -> None:
    file = write(tmp_path / "1.csv", HEADER + GOOD + line + lines(6, 5))
    source = CsvSource([file], SCHEMA, hashed=["t"], block_bytes=block_bytes)
    with pytest.raises(DataError, match="1.csv, .*(" + message + ")"):
        list(Reader(source, SCHEMA).batches(1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "1.csv: the file is empty"),
        (HEADER, "1.csv: the file has no rows"),
        ("y,d,s\n1,2,3\n", "1.csv, column 't': there is no such column.*y, d, s"),
        ("y,d,s,t,s\n1,2,3,a,3\n", "1.csv, column 's': 2 columns have this name"),
    ],
)
def test_an_empty_file_or_a_missing_column_is_an_error(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        CsvSource([write(tmp_path / "1.csv", text)], SCHEMA, hashed=["t"])


def test_text_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "1.csv").write_bytes(HEADER.encode() + b"x,1,2,3,\xff\xfe\n")
    with pytest.raises(DataError, match="1.csv, .*invalid UTF8"):
        read_all(CsvSource([str(tmp_path / "1.csv")], SCHEMA, hashed=["t"]))


def test_a_missing_file_is_an_error() -> None:
    with pytest.raises(DataError, match="no_such.csv: the file cannot be read"):
        CsvSource(["no_such.csv"], SCHEMA)


def test_hashed_columns_must_be_sparse() -> None:
    with pytest.raises(ValueError, match=r"hashed names \['d'\], but sparse has only \['s'\]"):
        CsvDataset([], [], label="y", dense=["d"], sparse={"s": 10}, hashed=["d"])
