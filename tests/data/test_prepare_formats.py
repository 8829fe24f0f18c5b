"""The raw formats, each read from a small file in its publisher's layout."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from torchrec_fmp.data.prepare import PrepareConfig, prepare
from torchrec_fmp.data.raw import delimited
from torchrec_fmp.data.vocabulary import Vocabulary

AVAZU_HEADER = (
    "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,"
    "app_category,device_id,device_ip,device_model,device_type,device_conn_type,"
    "C14,C15,C16,C17,C18,C19,C20,C21"
)


def read_values(out: Path, split: str, column: str) -> list:
    """Raw values of a column, recovered through the vocabulary; None if out of vocabulary."""
    vocabulary = Vocabulary.load(str(out / "vocabulary" / f"{column}.parquet"))
    known = [None, *vocabulary.values.to_pylist()]
    ids = pq.read_table(out / split / "part-00000.parquet")[column].to_pylist()
    return [[known[i] for i in id_] if isinstance(id_, list) else known[id_] for id_ in ids]


def read_column(out: Path, split: str, column: str) -> list:
    return pq.read_table(out / split / "part-00000.parquet")[column].to_pylist()


def criteo_line(label: int, integer: str, category: str) -> str:
    return "\t".join([str(label), *[integer] * 13, *[category] * 26])


@pytest.mark.parametrize("compressed", [False, True])
def test_criteo_gives_thirteen_dense_and_twenty_six_sparse_columns(tmp_path, compressed):
    lines = [criteo_line(1, "5", "68fd1e64"), criteo_line(0, "", '0"a'), criteo_line(0, "-1", "")]
    text = ("\n".join(lines) + "\n").encode()
    file = tmp_path / ("day_0.gz" if compressed else "train.txt")
    file.write_bytes(gzip.compress(text) if compressed else text)
    out = tmp_path / "out"
    config = PrepareConfig(
        format="criteo", inputs=[str(file)], out=str(out), min_count=1, test_fraction=0.3
    )
    schema = prepare(config)
    assert (len(schema.dense), len(schema.sparse), schema.label) == (13, 26, "label")
    assert read_column(out, "train", "label") == [1, 0]
    assert read_column(out, "train", "I13") == pytest.approx([np.log(6), 0.0])
    assert read_column(out, "test", "I1") == pytest.approx([-np.log(2)])
    assert read_values(out, "train", "C1") == ["68fd1e64", '0"a']
    assert read_values(out, "test", "C26") == [None]


def test_avazu_derives_the_time_of_day_drops_the_id_and_splits_by_hour(tmp_path):
    rows = [(1, "14102100"), (0, "14102523"), (0, "14102622"), (1, "14102100")]
    lines = [f"{i}00,{click},{hour}" + ",s" * 21 for i, (click, hour) in enumerate(rows)]
    file = tmp_path / "train.csv"
    file.write_text("\n".join([AVAZU_HEADER, *lines]) + "\n")
    out = tmp_path / "out"
    config = PrepareConfig(
        format="avazu",
        inputs=[str(file)],
        out=str(out),
        min_count=1,
        split="time",
        test_fraction=0.25,
    )
    schema = prepare(config)
    assert schema.label == "click"
    assert schema.dense == ()
    assert len(schema.sparse) == 23
    assert not {"id", "hour", "click"} & set(schema.sparse_names)
    assert read_column(out, "train", "click") == [1, 0, 1]
    assert read_values(out, "train", "hour_of_day") == ["0", "23", "0"]
    assert read_values(out, "train", "weekday") == ["1", "5", "1"]  # Tuesday, Saturday
    assert read_column(out, "test", "click") == [0]


def write_ml_1m(directory: Path) -> None:
    files = {
        "users.dat": ["1::F::1::10::48067", "2::M::56::16::70072"],
        "movies.dat": [
            "1::Toy Story (1995)::Animation|Children's",
            "260::Star Wars: Episode IV - A New Hope (1977)::Action",
            "3::Caf\xe9 au lait::Comedy",
        ],
        "ratings.dat": [
            "1::260::5::978300760",
            "1::3::3::978302109",
            "2::1::4::978300000",
            "2::260::1::978309999",
        ],
    }
    for name, lines in files.items():
        (directory / name).write_bytes(("\n".join(lines) + "\n").encode("latin-1"))


def write_ml_csv(directory: Path) -> None:
    files = {
        "movies.csv": [
            "movieId,title,genres",
            "1,Toy Story (1995),Animation|Children's",
            '260,"Star Wars: Episode IV, A ""New"" Hope (1977)",Action',
            "3,Caf\xe9 au lait,Comedy",
        ],
        "ratings.csv": [
            "userId,movieId,rating,timestamp",
            "1,260,5.0,978300760",
            "1,3,3.0,978302109",
            "2,1,3.5,978300000",
            "2,260,0.5,978309999",
        ],
        "tags.csv": ["userId,movieId,tag,timestamp"],
    }
    for name, lines in files.items():
        (directory / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize("write", [write_ml_1m, write_ml_csv])
def test_movielens_joins_movies_and_users_and_thresholds_the_rating(tmp_path, write):
    release = tmp_path / "release"
    release.mkdir()
    write(release)
    out = tmp_path / "out"
    config = PrepareConfig(
        format="movielens",
        inputs=[str(release)],
        out=str(out),
        min_count=1,
        split="time",
        test_fraction=0.25,
    )
    schema = prepare(config)
    user = ("gender", "age", "occupation", "zip") if write is write_ml_1m else ()
    assert schema.sparse_names == ("user_id", "movie_id", "genres", "release_year", *user)
    assert read_column(out, "train", "label") == [1, 0, 1]
    assert read_values(out, "train", "movie_id") == ["260", "3", "1"]
    assert read_values(out, "train", "genres") == [
        ["Action"],
        ["Comedy"],
        ["Animation", "Children's"],
    ]
    assert read_values(out, "train", "release_year") == ["1977", "", "1995"]
    assert read_column(out, "test", "label") == [0]
    if user:
        assert read_values(out, "train", "zip") == ["48067", "48067", "70072"]


def test_rating_threshold_changes_the_label(tmp_path):
    write_ml_1m(tmp_path)
    out = tmp_path / "out"
    config = PrepareConfig(
        format="movielens",
        inputs=[str(tmp_path)],
        out=str(out),
        rating_threshold=4.5,
        test_fraction=0.25,
    )
    prepare(config)
    assert read_column(out, "train", "label") == [1, 0, 0]


@pytest.mark.parametrize(("kind", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_delimited_values_are_kept_as_written(tmp_path, kind, delimiter):
    values = ["007", "7", "nan", "NULL"]
    lines = [delimiter.join(["0", value, "1.5"]) for value in values]
    file = tmp_path / f"raw.{kind}"
    file.write_text("\n".join([delimiter.join(["y", "a", "d"]), *lines]) + "\n")
    out = tmp_path / "out"
    config = PrepareConfig(
        format=kind,
        inputs=[str(file)],
        out=str(out),
        label="y",
        dense=["d"],
        min_count=1,
        test_fraction=0.2,
    )
    schema = prepare(config)
    assert schema.sparse_names == ("a",)
    assert read_values(out, "train", "a") == ["007", "7", "nan"]


def test_quoted_csv_fields_may_hold_delimiters_and_line_ends_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(delimited, "_BLOCK_BYTES", 64)
    file = tmp_path / "raw.csv"
    file.write_text("y,a\n" + '0,"x,\ny"\n1,plain\n' * 50)
    out = tmp_path / "out"
    config = PrepareConfig(
        format="csv", inputs=[str(file)], out=str(out), label="y", min_count=1, test_fraction=0.02
    )
    prepare(config)
    assert read_values(out, "train", "a") == ["x,\ny", "plain"] * 49


def test_files_of_a_directory_are_read_in_name_order(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    for name, value in (("part-1.csv", "second"), ("part-0.csv", "first"), ("_SUCCESS", "")):
        (raw / name).write_text(f"y,a\n0,{value}\n0,{value}\n" if value else "")
    out = tmp_path / "out"
    config = PrepareConfig(
        format="csv", inputs=[str(raw)], out=str(out), label="y", min_count=1, test_fraction=0.25
    )
    prepare(config)
    assert read_values(out, "train", "a") == ["first", "first", "second"]


def test_blocks_of_any_size_give_the_same_files(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    lines = [criteo_line(i % 2, str(rng.integers(9)), f"{rng.integers(50):x}") for i in range(300)]
    file = tmp_path / "train.txt"
    file.write_text("\n".join(lines))
    written = []
    for block_bytes in (1 << 20, 3_000):
        monkeypatch.setattr(delimited, "_BLOCK_BYTES", block_bytes)
        out = tmp_path / f"out{block_bytes}"
        prepare(PrepareConfig(format="criteo", inputs=[str(file)], out=str(out), split="seed"))
        splits = [pq.read_table(out / split / "part-00000.parquet") for split in ("train", "test")]
        written.append(splits)
    assert written[0] == written[1]
