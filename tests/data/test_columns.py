from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_fmp.data.batch import Rows, make_batch
from torchrec_fmp.data.columns import BadInput, decode, hash_string
from torchrec_fmp.data.errors import DataError
from torchrec_fmp.data.schema import Schema, SparseColumn

SCHEMA = Schema(label="y", dense=("d",), sparse=(SparseColumn("s", 100),))


def table(**columns: Any) -> pa.Table:
    rows = len(next(iter(columns.values())))
    return pa.table({"y": [0, 1] * (rows // 2) + [0] * (rows % 2), "d": [0.5] * rows} | columns)


def decode_table(content: pa.Table, bad_input: BadInput = "raise") -> Rows:
    numbers = range(1000, 1000 + content.num_rows)
    return decode(content, SCHEMA, file="f.parquet", row_numbers=numbers, bad_input=bad_input)


def bags(rows: Rows) -> list[list[int]]:
    """Bags of the rows, read from a batch."""
    features = make_batch([rows], len(rows), SCHEMA.dense, SCHEMA.sparse_names).sparse_features
    values = iter(features.values().tolist())
    return [[next(values) for _ in range(length)] for length in features.lengths().tolist()]


@pytest.mark.parametrize(
    "kind", [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint32(), pa.uint64()]
)
def test_ids_of_any_integer_type_are_read_unchanged(kind: pa.DataType) -> None:
    assert bags(decode_table(table(s=pa.array([0, 99, 7], kind)))) == [[0], [99], [7]]
    lists = pa.array([[0, 99], [], [7]], pa.list_(kind))
    assert bags(decode_table(table(s=lists))) == [[0, 99], [], [7]]


@pytest.mark.parametrize("kind", [pa.int8(), pa.int16(), pa.int32(), pa.int64()])
@pytest.mark.parametrize("num_embeddings", [1, 100, 1000, 2**40])
def test_a_negative_id_is_found_for_any_type_and_limit(
    kind: pa.DataType, num_embeddings: int
) -> None:
    schema = Schema(label="y", dense=("d",), sparse=(SparseColumn("s", num_embeddings),))
    content = table(s=pa.array([0, -1], kind))
    with pytest.raises(DataError, match=r"column 's', row 1: negative id \(-1\)"):
        decode(content, schema, file="f", row_numbers=range(2), bad_input="raise")


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.int64()), pa.large_list(pa.int64()), pa.list_(pa.int64(), 2)]
)
def test_lists_are_read_from_a_sliced_table(kind: pa.DataType) -> None:
    content = table(s=pa.array([[1, 2], [3, 4], [5, 6]], kind)).slice(1, 2)
    assert bags(decode_table(content)) == [[3, 4], [5, 6]]


@given(st.lists(st.lists(st.text()), min_size=1, max_size=8))
def test_strings_are_hashed_alike_alone_and_in_lists(strings: list[list[str]]) -> None:
    expected = [[hash_string(value.encode(), 100) for value in bag] for bag in strings]
    for kind in (pa.string(), pa.large_string()):
        lists = pa.array(strings, pa.list_(kind))
        assert bags(decode_table(table(s=lists))) == expected
        flat = pa.array([value for bag in strings for value in bag], kind)
        if len(flat):
            single = [[bucket] for bag in expected for bucket in bag]
            assert bags(decode_table(table(s=flat))) == single
            assert bags(decode_table(table(s=flat.dictionary_encode()))) == single


def test_the_hash_is_the_same_in_every_release() -> None:
    assert [hash_string(value, 2**62) for value in (b"", b"a", "ü".encode())] == [
        3797230976420062948,
        3405396810240292928,
        3976460501203677525,
    ]


def test_a_column_without_values_is_read_as_empty_bags_or_nulls() -> None:
    assert bags(decode_table(table(s=[[], []]))) == [[], []]
    assert bags(decode_table(table(s=[None, None]), "replace")) == [[0], [0]]
    with pytest.raises(DataError, match="column 's', row 1000: null"):
        decode_table(table(s=[None, None]))


def test_several_chunks_are_read_as_one() -> None:
    content = pa.concat_tables([table(s=["a", "b"]), table(s=["c"])])
    assert bags(decode_table(content)) == [[hash_string(v, 100)] for v in (b"a", b"b", b"c")]


def test_labels_and_dense_values_of_any_number_type_become_float32() -> None:
    schema = Schema(label="y", dense=("i", "b", "h"), sparse=(SparseColumn("s", 2),))
    content = pa.table(
        {
            "y": [True, False],
            "i": pa.array([3, 4], pa.uint8()),
            "b": [False, True],
            "h": pa.array(np.array([0.5, 2], np.float16)),
            "s": pa.array([True, False]).dictionary_encode(),
        }
    )
    rows = decode(content, schema, file="f", row_numbers=range(2), bad_input="raise")
    batch = make_batch([rows], 2, schema.dense, schema.sparse_names)
    assert batch.labels.tolist() == [1, 0]
    assert batch.dense_features.tolist() == [[3, 0, 0.5], [4, 1, 2]]
    assert batch.sparse_features.values().tolist() == [1, 0]


BAD = [
    ({"s": [1, None]}, r"column 's', row 1001: null\. .*'replace'", [[1], [0]]),
    ({"s": ["a", None]}, r"column 's', row 1001: null", [[hash_string(b"a", 100)], [0]]),
    ({"s": [1, 100]}, r"row 1001: id out of range \(100\)\. Valid ids are 0 to 99", [[1], [0]]),
    ({"s": [1, -3]}, r"row 1001: negative id \(-3\)", [[1], [0]]),
    ({"s": [[1], None]}, r"row 1001: null\. Write an empty list", [[1], []]),
    ({"s": [[1, 2], [3, None]]}, r"row 1001: null", [[1, 2], [3, 0]]),
    ({"s": [[], [3, 700]]}, r"row 1001: id out of range \(700\)", [[], [3, 0]]),
    ({"s": [["a"], [None]]}, r"row 1001: null", [[hash_string(b"a", 100)], [0]]),
]


@pytest.mark.parametrize(("columns", "message", "replaced"), BAD)
def test_a_bad_id_is_reported_or_replaced_and_counted(
    columns: dict[str, Any], message: str, replaced: list[list[int]]
) -> None:
    with pytest.raises(DataError, match="^f.parquet, .*" + message):
        decode_table(table(**columns))
    rows = decode_table(table(**columns), "replace")
    assert bags(rows) == replaced
    assert sum(rows.replaced.values()) == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "null"),
        (float("nan"), r"not finite in float32 \(nan\)"),
        (float("-inf"), r"not finite in float32 \(-inf\)"),
        (1e300, r"not finite in float32 \(1e\+300\)"),
    ],
)
def test_a_bad_dense_value_is_reported_or_replaced_and_counted(
    value: float | None, message: str
) -> None:
    content = table(d=[1.5, 2.5, value], s=[0, 0, 0])
    with pytest.raises(DataError, match=f"f.parquet, column 'd', row 1002: {message}"):
        decode_table(content)
    rows = decode_table(content, "replace")
    assert rows.dense[0].tolist() == [1.5, 2.5, 0.0]
    assert sum(rows.replaced.values()) == 1 and next(iter(rows.replaced))[0] == "d"


@pytest.mark.parametrize("label", [None, 2.0, 0.5, -1.0, float("nan")])
@pytest.mark.parametrize("bad_input", ["raise", "replace"])
def test_a_bad_label_is_an_error_even_where_bad_input_is_replaced(
    label: float | None, bad_input: BadInput
) -> None:
    shown = "null" if label is None else str(label)
    with pytest.raises(DataError, match=f"column 'y', row 1001: the label is {shown}"):
        decode_table(table(y=[1.0, label], s=[0, 0]), bad_input)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"s": [0.5, 1.0]}, "column 's': the column's type is double.*integers, strings or lists"),
        ({"s": [[0.5], []]}, "column 's': the column's type is list"),
        ({"s": [[[1]], []]}, "column 's': the column's type is list"),
        ({"s": [0, 0], "d": ["a", "b"]}, "column 'd': the column's type is string.*numbers"),
        ({"s": [0, 0], "y": ["0", "1"]}, "column 'y': the column's type is string.*numbers"),
        ({"other": [0, 0]}, "column 's': there is no such column.*y, d, other"),
    ],
)
def test_a_missing_column_or_a_wrong_type_is_an_error(
    columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        decode_table(table(**columns))


def test_a_duplicate_column_is_an_error() -> None:
    content = table(s=[0, 0]).append_column("s", pa.array([1, 1]))
    with pytest.raises(DataError, match="column 's': 2 columns have this name"):
        decode_table(content)
