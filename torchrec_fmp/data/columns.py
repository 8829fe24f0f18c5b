"""Converts Arrow tables to checked rows: types, ranges, nulls, string hashing."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from torchrec_fmp.data.batch import Bags, Ids, Rows
from torchrec_fmp.data.errors import DataError
from torchrec_fmp.data.schema import Schema, SparseColumn

BadInput = Literal["raise", "replace"]
"""Action for a value that cannot be trained on: an error, or 0 in its place, counted."""

RowNumbers = Sequence[int] | npt.NDArray[np.int64]

# A column without any values has type null.
_IDS = {
    *(pa.null(), pa.bool_()),
    *(pa.int8(), pa.int16(), pa.int32(), pa.int64()),
    *(pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()),
}
_NUMBERS = _IDS | {pa.float16(), pa.float32(), pa.float64()}
_STRINGS = {pa.string(), pa.large_string(), pa.binary(), pa.large_binary()}
_SPARSE = _IDS | _STRINGS
_REPLACE = "set bad_input to 'replace' to read such values as 0"


def hash_string(value: bytes, num_embeddings: int) -> int:
    """The bucket, 0 .. num_embeddings - 1, of a UTF-8 string: the same in every process."""
    digest = hashlib.blake2b(value, digest_size=8).digest()
    return int.from_bytes(digest, "little") % num_embeddings


def check_columns(types: pa.Schema, schema: Schema, file: str) -> None:
    """Checks that each column of `schema` exists exactly once, with a readable type.

    Raises:
        DataError: if a column fails the check; names the file and the first such column.
    """
    for name in schema.columns:
        count = len(types.get_all_field_indices(name))
        if count != 1:
            raise DataError(
                "there is no such column" if count == 0 else f"{count} columns have this name",
                file=file,
                column=name,
                remedy=f"Columns of the file: {', '.join(types.names)}.",
            )
    for name in (schema.label, *schema.dense):
        if _element(types.field(name).type) not in _NUMBERS:
            raise _wrong_type(types.field(name), "numbers", file)
    for name in schema.sparse_names:
        kind = types.field(name).type
        if _element(kind.value_type if _is_list(kind) else kind) not in _SPARSE:
            raise _wrong_type(types.field(name), "integers, strings or lists of either", file)


def decode(
    table: pa.Table, schema: Schema, *, file: str, row_numbers: RowNumbers, bad_input: BadInput
) -> Rows:
    """Checks a table's values and returns them as arrays for batches.

    Integers in sparse columns are ids; strings are hashed into `num_embeddings` buckets. With
    `bad_input="replace"`, a bad id becomes 0, a bad dense value 0.0, a null list an empty bag. A
    row with a bad label cannot be replaced: nothing is learned from it, and leaving it out would
    give ranks different numbers of rows.

    Args:
        table: table with at least the columns of `schema`.
        schema: columns to read, and the limits of their ids.
        file: file that the table is from, for messages.
        row_numbers: row number in the file of each row of the table, for messages.
        bad_input: action for nulls, ids outside [0, num_embeddings) and non-finite values.

    Raises:
        DataError: for the first bad value; names file, column and row.
    """
    check_columns(table.schema, schema, file)
    checks = _Checks(file, row_numbers, bad_input)
    return Rows(
        labels=checks.labels(schema.label, _array(table, schema.label)),
        dense=tuple(checks.dense(name, _array(table, name)) for name in schema.dense),
        sparse=tuple(checks.bags(column, _array(table, column.name)) for column in schema.sparse),
        replaced=checks.replaced,
    )


@dataclass(frozen=True)
class _Checks:
    file: str
    row_numbers: RowNumbers
    bad_input: BadInput
    replaced: Counter[tuple[str, str]] = field(default_factory=Counter)

    def labels(self, name: str, array: pa.Array) -> npt.NDArray[np.float32]:
        remedy = "Correct or remove the row: a label must be 0 or 1 and is never replaced."
        if array.null_count:
            raise self._error(name, "the label is null", _first(_nulls(array)), remedy)
        labels = array.to_numpy(zero_copy_only=False)
        bad = (labels != 0) & (labels != 1)
        if bad.any():
            row = _first(bad)
            raise self._error(name, f"the label is {labels[row]}", row, remedy)
        return labels.astype(np.float32, copy=False)

    def dense(self, name: str, array: pa.Array) -> npt.NDArray[np.float32]:
        remedy = f"Correct the value, or {_REPLACE}."
        if array.null_count:
            self._handle(name, "null", _nulls(array), None, remedy)
            array = array.fill_null(0)
        values = array.to_numpy(zero_copy_only=False)
        with np.errstate(over="ignore"):
            values_fp32: npt.NDArray[np.float32] = values.astype(np.float32, copy=False)
        finite = np.isfinite(values_fp32)
        if finite.all():
            return values_fp32
        self._handle(name, "not finite in float32", ~finite, values, remedy)
        return np.where(finite, values_fp32, np.float32(0))

    def bags(self, column: SparseColumn, array: pa.Array) -> Bags:
        if not _is_list(array.type):
            return Bags(self._ids(column, array, None))
        if array.null_count:
            remedy = "Write an empty list where a row has no id, or set bad_input to 'replace'."
            self._handle(column.name, "null", _nulls(array), None, remedy)
        lengths = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False)
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return Bags(self._ids(column, _decoded(array.flatten()), offsets), offsets)

    def _ids(
        self, column: SparseColumn, array: pa.Array, offsets: npt.NDArray[np.int64] | None
    ) -> Ids:
        if array.null_count:
            remedy = f"Give missing values a separate id, or {_REPLACE}."
            self._handle(column.name, "null", _nulls(array), None, remedy, offsets)
        if _element(array.type) in _STRINGS:
            return _buckets(array, column.num_embeddings)
        if array.null_count:
            array = array.fill_null(0)
        ids: Ids = array.to_numpy(zero_copy_only=False)
        # Viewed as unsigned, a negative id exceeds the signed type's maximum: one pass finds both.
        limit = min(column.num_embeddings, np.iinfo(ids.dtype).max + 1)
        if not len(ids) or int(ids.view(f"u{ids.dtype.itemsize}").max()) < limit:
            return ids
        remedy = (
            f"Valid ids are 0 to {column.num_embeddings - 1}: raise num_embeddings, map the "
            f"values to ids with `torchrec-fmp prepare`, or {_REPLACE}."
        )
        negative, above = ids < 0, ids >= column.num_embeddings
        for problem, bad in (("negative id", negative), ("id out of range", above)):
            if bad.any():
                self._handle(column.name, problem, bad, ids, remedy, offsets)
        return np.where(negative | above, ids.dtype.type(0), ids)

    def _handle(
        self,
        column: str,
        problem: str,
        bad: npt.NDArray[np.bool_],
        values: npt.NDArray[Any] | None,
        remedy: str,
        offsets: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Raises or counts; `bad` marks values, which are rows if there are no offsets."""
        if self.bad_input == "replace":
            self.replaced[column, problem] += int(bad.sum())
            return
        first = _first(bad)
        row = first if offsets is None else int(np.searchsorted(offsets, first, "right")) - 1
        value = "" if values is None else f" ({values[first]})"
        raise self._error(column, problem + value, row, remedy)

    def _error(self, column: str, problem: str, row: int, remedy: str) -> DataError:
        return DataError(
            problem, file=self.file, column=column, row=int(self.row_numbers[row]), remedy=remedy
        )


def _buckets(strings: pa.Array, num_embeddings: int) -> npt.NDArray[np.int64]:
    """Hashes each distinct string once; null is bucket 0."""
    encoded = strings if pa.types.is_dictionary(strings.type) else strings.dictionary_encode()
    distinct = encoded.dictionary.cast(pa.large_binary()).to_pylist()
    buckets = np.array([*(hash_string(value, num_embeddings) for value in distinct), 0], np.int64)
    # The index type may be too narrow for the position of the 0 that represents null.
    indices = encoded.indices.cast(pa.int64()).fill_null(len(distinct))
    return buckets[indices.to_numpy(zero_copy_only=False)]


def _array(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    return _decoded(column.chunk(0) if column.num_chunks == 1 else column.combine_chunks())


def _decoded(array: pa.Array) -> pa.Array:
    """Removes encodings that NumPy lacks; keeps a dictionary of strings, for hashing."""
    if array.type in (pa.null(), pa.bool_()):
        return array.cast(pa.uint8())
    if pa.types.is_dictionary(array.type) and (
        array.type.value_type not in _STRINGS or array.dictionary.null_count
    ):
        return _decoded(array.dictionary_decode())
    return array


def _element(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_list(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType)


def _wrong_type(column: pa.Field, expected: str, file: str) -> DataError:
    return DataError(
        f"the column's type is {column.type}",
        file=file,
        column=column.name,
        remedy=f"It must hold {expected}: convert it, or name another column.",
    )


def _nulls(array: pa.Array) -> npt.NDArray[np.bool_]:
    nulls: npt.NDArray[np.bool_] = array.is_null().to_numpy(zero_copy_only=False)
    return nulls


def _first(bad: npt.NDArray[np.bool_]) -> int:
    return int(np.argmax(bad))
