"""`prepare` as a whole: its output for any table, which is written completely or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_fmp.data import prepare as prepare_module
from torchrec_fmp.data.errors import DataError
from torchrec_fmp.data.prepare import PrepareConfig, prepare
from torchrec_fmp.data.schema import Schema, SparseColumn
from torchrec_fmp.data.vocabulary import Vocabulary

SHARED_DATA = Path(__file__).parents[2].parent / "shared" / "data"


def write_parquet(path: Path, **columns: list) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def config_for(tmp_path: Path, file: str, **options) -> PrepareConfig:
    options = {"format": "parquet", "label": "y", "split": "column", "split_column": "t"} | options
    return PrepareConfig(inputs=[file], out=str(tmp_path / "out"), **options)


def read_split(tmp_path: Path, split: str) -> dict[str, list]:
    return pq.read_table(tmp_path / "out" / split / "part-00000.parquet").to_pydict()


def test_ids_are_assigned_by_descending_training_count_with_ties_by_value(tmp_path):
    file = write_parquet(
        tmp_path / "raw.parquet",
        y=[0, 1, 0, 1, 0, 1, 0, 1],
        a=["b", "b", "c", "a", "a", "rare", "only_test", "b"],
        t=[0, 0, 0, 0, 0, 0, 1, 1],
    )
    schema = prepare(config_for(tmp_path, file, min_count=1))
    assert schema == Schema("y", (), (SparseColumn("a", 5),))
    assert read_split(tmp_path, "train")["a"] == [2, 2, 3, 1, 1, 4]
    assert read_split(tmp_path, "test")["a"] == [0, 2]


def test_values_rarer_than_min_count_are_out_of_vocabulary(tmp_path):
    file = write_parquet(
        tmp_path / "raw.parquet", y=[0] * 6, a=["x", "x", "x", "z", "z", "w"], t=[0] * 5 + [1]
    )
    schema = prepare(config_for(tmp_path, file, min_count=3))
    assert schema.sparse == (SparseColumn("a", 2),)
    assert read_split(tmp_path, "train")["a"] == [1, 1, 1, 0, 0]
    report = json.loads((tmp_path / "out" / "prepare.json").read_text())
    assert report["rows"] == {"train": 5, "test": 1}
    assert report["out_of_vocabulary"] == {"train": {"a": 0.4}, "test": {"a": 1.0}}
    assert report["config"]["min_count"] == 3


def test_missing_values_have_an_id_like_any_other_value(tmp_path):
    file = write_parquet(
        tmp_path / "raw.parquet", y=[0] * 6, a=[None, "x", None, "", "x", None], t=[0] * 5 + [1]
    )
    prepare(config_for(tmp_path, file))
    assert read_split(tmp_path, "train")["a"] == [1, 2, 1, 1, 2]
    assert read_split(tmp_path, "test")["a"] == [1]


def test_lists_stay_lists_and_a_missing_list_is_empty(tmp_path):
    file = write_parquet(
        tmp_path / "raw.parquet",
        y=[0] * 5,
        words=[["b", "a"], [], None, ["b", None, "b"], ["new", "a"]],
        numbers=[[7, 7], [8], [7], [], [8]],
        t=[0] * 4 + [1],
    )
    prepare(config_for(tmp_path, file, min_count=1))
    assert read_split(tmp_path, "train")["words"] == [[1, 3], [], [], [1, 2, 1]]
    assert read_split(tmp_path, "test")["words"] == [[0, 3]]
    assert read_split(tmp_path, "train")["numbers"] == [[1, 1], [2], [1], []]


STRINGS = pa.array(["1", "0", "1", "1"])


@pytest.mark.parametrize(
    "values",
    [
        STRINGS.cast(pa.large_string()),
        STRINGS.dictionary_encode(),
        STRINGS.cast(pa.binary()),
        STRINGS.cast(pa.int64()),
        pa.array([True, False, True, True]),
    ],
    ids=lambda values: str(values.type),
)
def test_sparse_columns_of_any_plain_type_get_ids(tmp_path, values):
    file = str(tmp_path / "raw.parquet")
    pq.write_table(pa.table({"y": [0] * 4, "a": values, "t": [0, 0, 0, 1]}), file)
    prepare(config_for(tmp_path, file, min_count=1))
    assert read_split(tmp_path, "train")["a"] == [1, 2, 1]


def test_dense_columns_are_log_transformed_and_missing_values_become_zero(tmp_path):
    columns = {"y": [0] * 4, "d": [3.0, -3.0, None, 0.0], "a": [1] * 4, "t": [0, 0, 0, 1]}
    file = write_parquet(tmp_path / "raw.parquet", **columns)
    schema = prepare(config_for(tmp_path, file, dense=["d"]))
    assert schema.dense == ("d",)
    dense = read_split(tmp_path, "train")["d"]
    np.testing.assert_allclose(dense, [np.log(4), -np.log(4), 0.0], rtol=1e-6)


def test_log_transform_can_be_switched_off(tmp_path):
    file = write_parquet(
        tmp_path / "raw.parquet", y=[0] * 3, d=["3", " -2.5 ", ""], a=[1] * 3, t=[0, 0, 1]
    )
    prepare(config_for(tmp_path, file, dense=["d"], log_dense=False))
    assert read_split(tmp_path, "train")["d"] == [3.0, -2.5]


def test_types_on_disk_are_the_types_that_training_reads(tmp_path):
    file = write_parquet(
        tmp_path / "raw.parquet", y=["0", "1"], d=[1, 2], a=["u", "v"], b=[["u"], []], t=["0", "1"]
    )
    prepare(config_for(tmp_path, file, dense=["d"]))
    parquet = pq.ParquetFile(tmp_path / "out" / "train" / "part-00000.parquet")
    assert parquet.schema_arrow.names == ["y", "d", "a", "b"]
    assert parquet.schema_arrow.types == [
        pa.int8(),
        pa.float32(),
        pa.int32(),
        pa.list_(pa.int32()),
    ]
    assert parquet.metadata.row_group(0).column(0).compression == "ZSTD"


def test_row_groups_have_the_requested_size(tmp_path):
    file = write_parquet(tmp_path / "raw.parquet", y=[0] * 11, a=[1] * 11, t=[0] * 10 + [1])
    prepare(config_for(tmp_path, file, row_group_rows=4))
    metadata = pq.read_metadata(tmp_path / "out" / "train" / "part-00000.parquet")
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [4, 4, 2]


def test_saved_schema_and_vocabulary_reproduce_the_ids_on_disk(tmp_path):
    values = ["x", "y", "x", "q", "new"]
    file = write_parquet(tmp_path / "raw.parquet", y=[0] * 5, **{"a/b": values}, t=[0] * 4 + [1])
    schema = prepare(config_for(tmp_path, file, min_count=1))
    assert Schema.load(str(tmp_path / "out" / "schema.json")) == schema
    vocabulary = Vocabulary.load(str(tmp_path / "out" / "vocabulary" / "a%2Fb.parquet"))
    ids = read_split(tmp_path, "train")["a/b"] + read_split(tmp_path, "test")["a/b"]
    assert vocabulary.ids(pa.array(values, pa.large_string())).to_pylist() == ids
    saved = pq.read_table(tmp_path / "out" / "vocabulary" / "a%2Fb.parquet").to_pydict()
    assert saved == {"value": ["x", "q", "y"], "id": [1, 2, 3], "count": [2, 1, 1]}


def test_hashing_writes_no_vocabulary_and_ids_stay_below_hash_buckets(tmp_path):
    file = write_parquet(
        tmp_path / "raw.parquet", y=[0] * 6, a=["p", "q", "r", "p", None, "p"], t=[0] * 5 + [1]
    )
    schema = prepare(config_for(tmp_path, file, hash_buckets=5))
    assert schema.sparse == (SparseColumn("a", 5),)
    train, test = read_split(tmp_path, "train")["a"], read_split(tmp_path, "test")["a"]
    assert train[0] == train[3] == test[0]
    assert all(0 <= id_ < 5 for id_ in train)
    assert not (tmp_path / "out" / "vocabulary").exists()


@settings(max_examples=15, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from([0, 1]), st.text(st.characters(codec="utf-8"), max_size=3)),
        min_size=2,
        max_size=60,
    ),
    files=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_no_row_is_lost_changed_or_reordered_for_any_division_into_files(rows, files, seed):
    with tempfile.TemporaryDirectory() as directory:
        tmp_path = Path(directory)
        flags = np.random.default_rng(seed).permutation([0, 1] * len(rows))[: len(rows)]
        flags[:2] = [0, 1]
        inputs = []
        for part, index in enumerate(np.array_split(np.arange(len(rows)), files)):
            inputs.append(str(tmp_path / f"{part}.parquet"))
            columns = {
                "y": pa.array([rows[i][0] for i in index], pa.int64()),
                "a": pa.array([rows[i][1] for i in index], pa.string()),
                "t": pa.array(flags[index].tolist(), pa.int64()),
            }
            pq.write_table(pa.table(columns), inputs[-1])
        config = PrepareConfig(
            format="parquet",
            inputs=inputs,
            out=str(tmp_path / "out"),
            label="y",
            min_count=1,
            split="column",
            split_column="t",
        )
        prepare(config)
        vocabulary = Vocabulary.load(str(tmp_path / "out" / "vocabulary" / "a.parquet"))
        known = [None, *vocabulary.values.to_pylist()]
        train_values = {value for (_, value), flag in zip(rows, flags, strict=True) if not flag}
        for split, flag in (("train", 0), ("test", 1)):
            expected = [row for row, of_row in zip(rows, flags, strict=True) if of_row == flag]
            written = read_split(tmp_path, split)
            assert written["y"] == [label for label, _ in expected]
            assert [known[id_] for id_ in written["a"]] == [
                value if value in train_values else None for _, value in expected
            ]


def test_a_non_empty_output_directory_is_refused_and_unchanged(tmp_path):
    file = write_parquet(tmp_path / "raw.parquet", y=[0, 1], a=[1, 2], t=[0, 1])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(FileExistsError, match="out exists and is not empty"):
        prepare(config_for(tmp_path, file))
    assert os.listdir(tmp_path / "out") == ["precious"]


def test_an_empty_output_directory_is_used(tmp_path):
    file = write_parquet(tmp_path / "raw.parquet", y=[0, 1], a=[1, 2], t=[0, 1])
    (tmp_path / "out").mkdir()
    prepare(config_for(tmp_path, file))
    assert (tmp_path / "out" / "schema.json").is_file()
    assert sorted(os.listdir(tmp_path)) == ["out", "raw.parquet"]


def test_nothing_remains_after_an_error_in_the_last_row(tmp_path):
    file = write_parquet(tmp_path / "raw.parquet", y=[0, 1, 2], a=[1, 2, 3], t=[0, 1, 0])
    with pytest.raises(DataError, match="2 is not 0 or 1"):
        prepare(config_for(tmp_path, file))
    assert os.listdir(tmp_path) == ["raw.parquet"]


def test_nothing_remains_after_an_interruption_at_the_very_end(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    file = write_parquet(tmp_path / "raw.parquet", y=[0, 1], a=[1, 2], t=[0, 1])
    monkeypatch.setattr(prepare_module, "_save_vocabularies", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(config_for(tmp_path, file))
    assert os.listdir(tmp_path) == ["raw.parquet"]


@pytest.mark.parametrize("out", ["s3://bucket/x", "http://localhost/x"])
def test_a_remote_output_directory_is_refused(tmp_path, out):
    config = PrepareConfig(format="criteo", inputs=["absent"], out=out)
    with pytest.raises(ValueError, match="is not local"):
        prepare(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": []}, "inputs is empty; it must name"),
        ({"label": None}, "needs the name of the label column"),
        ({"split": "time"}, "split time of format csv needs split_column"),
        ({"split_column": "t"}, "split_column has no effect with split order"),
        ({"min_count": 0}, "min_count is 0; it must be at least 1"),
        ({"hash_buckets": 0}, "hash_buckets is 0"),
        ({"row_group_rows": -1}, "row_group_rows is -1"),
        ({"test_fraction": 1.0}, "test_fraction is 1.0; it must be between 0 and 1"),
        ({"format": "criteo"}, "label cannot be set: format criteo has fixed columns"),
        ({"format": "criteo", "label": None, "split": "time"}, "no column for split time"),
        ({"format": "movielens", "label": None, "inputs": ["a", "b"]}, "takes one directory"),
    ],
)
def test_contradictory_options_are_refused_before_any_file_is_read(options, message):
    with pytest.raises(ValueError, match=message):
        PrepareConfig(**({"format": "csv", "inputs": ["x"], "out": "y", "label": "z"} | options))


def test_a_real_data_set_is_prepared_whole(tmp_path):
    file = SHARED_DATA / "census_kdd.parquet"
    if not file.exists():
        pytest.skip("the real data sets are not beside the repository (../shared/data)")
    config = config_for(tmp_path, str(file), label="label", split_column="is_test")
    schema = prepare(config)
    rows = pq.read_metadata(file).num_rows
    written = json.loads((tmp_path / "out" / "prepare.json").read_text())["rows"]
    assert len(schema.sparse) == 40
    assert sum(written.values()) == rows
    assert written["test"] == pytest.approx(0.1 * rows, rel=0.01)
