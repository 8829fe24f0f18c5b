"""Converts raw columns for training: labels, dense numbers, and values that become ids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from torchrec_fmp.data.errors import DataError
from torchrec_fmp.data.raw.table import RawChunk

_NOT_CONVERTIBLE = (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError)


@dataclass(frozen=True)
class SparseValues:
    """The values of one sparse column.

    Args:
        values: large strings; a missing value is "".
        offsets: int32 start of each row's values, then the end; None if each row has one value.
    """

    values: pa.LargeStringArray
    offsets: pa.Int32Array | None


def to_numbers(chunk: RawChunk, name: str) -> pa.DoubleArray:
    """The column as float64; an empty string is null.

    Raises:
        DataError: if a value is not a number.
    """
    column = chunk.rows[name]
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = pc.utf8_trim_whitespace(column)
        column = pc.if_else(pc.equal(column, ""), pa.scalar(None, column.type), column)
    try:
        return pc.cast(column, pa.float64(), safe=False)
    except _NOT_CONVERTIBLE as error:
        index = next((index for index, value in enumerate(column) if not _is_number(value)), 0)
        raise chunk.error(
            f"{column[index].as_py()!r} is not a number",
            column=name,
            index=index,
            remedy="Repair the row, or make the column sparse if its values are names.",
        ) from error


def to_labels(chunk: RawChunk, name: str) -> pa.Int8Array:
    """The column as int8.

    Raises:
        DataError: if a label is neither 0 nor 1.
    """
    return _zeros_and_ones(chunk, name, "A label must be 0 or 1: repair or remove the row.")


def to_test_mask(chunk: RawChunk, name: str) -> pa.Int8Array:
    """The column as int8: 1 where the row belongs to the test split.

    Raises:
        DataError: if a value is neither 0 nor 1.
    """
    return _zeros_and_ones(chunk, name, "A split column must be 0 (train) or 1 (test).")


def to_dense(chunk: RawChunk, name: str, log: bool) -> pa.FloatArray:
    """The column as float32, missing values as 0; with `log`, sign(x) * log(1 + abs(x)).

    Raises:
        DataError: if a value is not a number, NaN, or infinite (in float32, after the logarithm).
    """
    numbers = to_numbers(chunk, name).fill_null(0.0).to_numpy()
    if log:
        numbers = np.copysign(np.log1p(np.abs(numbers)), numbers)
    with np.errstate(over="ignore"):
        dense = numbers.astype(np.float32)
    finite = np.isfinite(dense)
    if not finite.all():
        index = int(np.argmin(finite))
        raise chunk.error(
            f"{chunk.rows[name][index].as_py()!r} is not a finite float32",
            column=name,
            index=index,
            remedy="Repair the row, or leave the field empty, which reads as 0.",
        )
    return pa.array(dense)


def to_values(chunk: RawChunk, name: str, multivalued: bool) -> SparseValues:
    """The column's values as strings; a missing list is read as empty.

    Raises:
        DataError: if the values cannot be strings (structures, lists of lists, not UTF-8).
    """
    column = chunk.rows[name]
    offsets = None
    if multivalued:
        lengths = pc.list_value_length(column).fill_null(0).to_numpy()
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        column = column.flatten()
    try:
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        return SparseValues(pc.cast(column, pa.large_string()).fill_null(""), offsets)
    except _NOT_CONVERTIBLE as error:
        raise DataError(
            f"values of type {column.type} cannot be written as strings: {error}".rstrip("."),
            file=chunk.file,
            column=name,
            remedy="Sparse columns must hold numbers, strings, or lists of either.",
        ) from error


def _zeros_and_ones(chunk: RawChunk, name: str, remedy: str) -> pa.Int8Array:
    numbers = to_numbers(chunk, name)
    good = pc.or_(pc.equal(numbers, 0.0), pc.equal(numbers, 1.0)).fill_null(False)
    if not pc.all(good, min_count=0).as_py():
        index = pc.index(good, False).as_py()
        value = chunk.rows[name][index].as_py()
        raise chunk.error(f"{value!r} is not 0 or 1", column=name, index=index, remedy=remedy)
    return numbers.cast(pa.int8())


def _is_number(value: pa.Scalar) -> bool:
    try:
        value.cast(pa.float64())
    except _NOT_CONVERTIBLE:
        return False
    return True
