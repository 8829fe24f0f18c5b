"""Maps values of a sparse column to ids, by a vocabulary of frequent values or by hashing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from torchrec_fmp import paths
from torchrec_fmp.data.columns import hash_string

OUT_OF_VOCABULARY = 0

_MERGE_ROWS = 1 << 16


class IdMap(Protocol):
    """Maps values to ids 0 .. num_embeddings - 1."""

    @property
    def num_embeddings(self) -> int:
        """Number of ids."""

    def ids(self, values: pa.LargeStringArray) -> pa.Int32Array:
        """One id per value."""


class ValueCounts:
    """Counts each distinct value; memory grows with the distinct values, not with the rows."""

    def __init__(self) -> None:
        self._merged = pa.table(
            {"value": pa.array([], pa.large_string()), "count": pa.array([], pa.int64())}
        )
        self._pending: list[pa.Table] = []
        self._pending_rows = 0

    def add(self, values: pa.LargeStringArray) -> None:
        """Counts these values; none may be null."""
        counted = values.value_counts()
        self._pending.append(
            pa.table({"value": counted.field("values"), "count": counted.field("counts")})
        )
        self._pending_rows += len(counted)
        # Merging only when the pending rows outgrow the merged ones keeps the total work linear.
        if self._pending_rows > max(_MERGE_ROWS, self._merged.num_rows):
            self._merge()

    def table(self) -> pa.Table:
        """Distinct values (`value`) and their counts (`count`), in arbitrary order."""
        self._merge()
        return self._merged

    def _merge(self) -> None:
        both = pa.concat_tables([self._merged, *self._pending])
        # Several times faster than group_by, which is slow at sums over groups of strings.
        encoded = both["value"].combine_chunks().dictionary_encode()
        # Sums are in float64, hence exact below 2**53 rows.
        totals = np.bincount(
            encoded.indices, weights=both["count"], minlength=len(encoded.dictionary)
        )
        self._merged = pa.table({"value": encoded.dictionary, "count": totals.astype(np.int64)})
        self._pending, self._pending_rows = [], 0


@dataclass(frozen=True)
class Vocabulary:
    """Ids 1, 2, ... for the frequent values, the most frequent first; id 0 for all others.

    Args:
        values: distinct large strings; the first has id 1.
        counts: int64 number of occurrences of each value.
    """

    values: pa.LargeStringArray
    counts: pa.Int64Array

    @staticmethod
    def of_frequent(counts: ValueCounts, min_count: int) -> Vocabulary:
        """The values that occurred at least `min_count` times; ties are ordered by value."""
        table = counts.table()
        frequent = table.filter(pc.greater_equal(table["count"], min_count)).sort_by(
            [("count", "descending"), ("value", "ascending")]
        )
        return Vocabulary(frequent["value"].combine_chunks(), frequent["count"].combine_chunks())

    @property
    def num_embeddings(self) -> int:
        return len(self.values) + 1

    def ids(self, values: pa.LargeStringArray) -> pa.Int32Array:
        """One id per value, 0 if it is not in the vocabulary."""
        encoded = values.dictionary_encode()
        # The vocabulary is looked up in a hash table of the chunk's values: a hash table of a
        # large vocabulary costs several times more, and pyarrow cannot keep one.
        positions = pc.index_in(self.values, encoded.dictionary)
        present = pc.indices_nonzero(positions.is_valid()).to_numpy()
        ids = np.full(len(encoded.dictionary), OUT_OF_VOCABULARY, np.int32)
        ids[positions.drop_null().to_numpy()] = present + 1
        return pa.array(ids[encoded.indices.to_numpy()])

    def save(self, path: str) -> None:
        """Writes Parquet with the columns value, id and count."""
        ids = pa.array(np.arange(1, self.num_embeddings, dtype=np.int32))
        table = pa.table({"value": self.values, "id": ids, "count": self.counts})
        with paths.open_path(path, "wb") as file:
            pq.write_table(table, file, compression="zstd")

    @staticmethod
    def load(path: str) -> Vocabulary:
        """Reads what `save` wrote."""
        with paths.open_path(path, "rb") as file:
            table = pq.read_table(file)
        return Vocabulary(table["value"].combine_chunks(), table["count"].combine_chunks())


@dataclass(frozen=True)
class HashBuckets:
    """Ids by hashing: blake2b of the value's UTF-8 modulo the number of buckets."""

    num_embeddings: int

    def ids(self, values: pa.LargeStringArray) -> pa.Int32Array:
        """One id per value; the same on every machine."""
        encoded = values.dictionary_encode()
        distinct = (value.encode() for value in encoded.dictionary.to_pylist())
        buckets = [hash_string(value, self.num_embeddings) for value in distinct]
        return pa.array(np.array(buckets, np.int32)[encoded.indices.to_numpy()])
