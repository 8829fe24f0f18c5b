"""Schemas: the columns, their order, and their file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from torchrec_fmp.data.schema import Schema, SparseColumn

SCHEMA = Schema("y", ("x", "z"), (SparseColumn("b", 5), SparseColumn("a", 70)))


def test_columns_are_in_the_order_in_which_the_model_reads_them() -> None:
    assert SCHEMA.columns == ("y", "x", "z", "b", "a")
    assert SCHEMA.sparse_names == ("b", "a")
    assert SCHEMA.features == ("x", "z", "b", "a")


def test_a_subset_of_the_features_keeps_order_cardinality_and_label() -> None:
    assert SCHEMA.only(["a", "z"]) == Schema("y", ("z",), (SparseColumn("a", 70),))
    assert SCHEMA.only(SCHEMA.features) == SCHEMA


def test_a_schema_without_sparse_columns_is_refused() -> None:
    with pytest.raises(ValueError, match="no sparse column"):
        SCHEMA.only(["x"])


@pytest.mark.parametrize("dense", [("x", "x"), ("y",), ("a",)])
def test_a_column_named_more_than_once_is_refused(dense: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=rf"more than once in the schema: \['{dense[0]}'\]"):
        Schema("y", dense, SCHEMA.sparse)


@pytest.mark.parametrize("size", [0, -1])
def test_num_embeddings_below_1_is_refused_and_its_column_named(size: int) -> None:
    with pytest.raises(ValueError, match=f"'a': num_embeddings is {size}; .*at least 1"):
        SparseColumn("a", size)


def test_a_saved_schema_loads(tmp_path: Path) -> None:
    path = str(tmp_path / "schema.json")
    SCHEMA.save(path)
    assert Schema.load(path) == SCHEMA


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="schema.json"):
        Schema.load(str(tmp_path / "schema.json"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1"),
        ("[]", "TypeError"),
        ('{"label": "y", "dense": []}', "'sparse'"),
        ('{"label": "y", "dense": [], "sparse": [{"name": "a"}]}', "num_embeddings"),
        ('{"label": "y", "dense": [], "sparse": []}', "no sparse column"),
        (
            json.dumps({"label": "y", "dense": [], "sparse": [{"name": "a", "rows": 1}]}),
            "rows",
        ),
    ],
)
def test_the_error_for_an_invalid_schema_file_names_the_file_and_the_problem(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "schema.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"schema.json is not a schema file .*{message}"):
        Schema.load(str(path))
