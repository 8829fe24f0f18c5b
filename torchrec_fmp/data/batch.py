"""Checked rows as NumPy columns, and the batch that the model reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

Ids = npt.NDArray[np.integer[Any]]


class Bags(NamedTuple):
    """The ids of one sparse feature, one bag per row.

    Args:
        ids: (number of ids,) ids of any integer type.
        offsets: (rows + 1,) int64; row r has ids[offsets[r]:offsets[r + 1]]. None if every row
            has exactly one id.
    """

    ids: Ids
    offsets: npt.NDArray[np.int64] | None = None

    def slice(self, start: int, stop: int) -> Bags:
        if self.offsets is None:
            return Bags(self.ids[start:stop])
        first, last = self.offsets[start], self.offsets[stop]
        return Bags(self.ids[first:last], self.offsets[start : stop + 1] - first)


@dataclass(frozen=True)
class Rows:
    """Checked rows, stored by column. Arrays may be views of Arrow's memory.

    Args:
        labels: (rows,) float32, each 0 or 1.
        dense: (rows,) float32 values of each dense column, all finite.
        sparse: bags of each sparse column.
        replaced: number of replaced values in these rows for each (column, problem).
    """

    labels: npt.NDArray[np.float32]
    dense: tuple[npt.NDArray[np.float32], ...]
    sparse: tuple[Bags, ...]
    replaced: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.labels)

    def slice(self, start: int, stop: int) -> Rows:
        """Rows [start, stop) without copying; `replaced` is not carried over."""
        return Rows(
            self.labels[start:stop],
            tuple([column[start:stop] for column in self.dense]),
            tuple([bags.slice(start, stop) for bags in self.sparse]),
        )


def make_batch(
    pieces: Sequence[Rows], batch_size: int, dense: Sequence[str], sparse: Sequence[str]
) -> Batch:
    """Joins the rows of all pieces into one batch, padded to `batch_size` rows.

    A padding row has label 0, dense values 0 and empty bags.

    Args:
        pieces: rows in order, at most `batch_size` in total.
        batch_size: B, number of rows in the batch.
        dense: names of the N dense columns.
        sparse: names of the F sparse columns.

    Returns:
        A batch that shares no memory with the pieces: dense_features (B, N) float32,
        sparse_features with int64 values and int32 lengths (F * B,), labels (B,) float32.
    """
    labels_B = np.empty(batch_size, np.float32)
    dense_BN = np.empty((batch_size, len(dense)), np.float32)
    lengths_FB = np.ones((len(sparse), batch_size), np.int32)
    start = 0
    for piece in pieces:
        stop = start + len(piece)
        labels_B[start:stop] = piece.labels
        for n, column in enumerate(piece.dense):
            dense_BN[start:stop, n] = column
        for f, bags in enumerate(piece.sparse):
            if bags.offsets is not None:
                lengths_FB[f, start:stop] = np.diff(bags.offsets)
        start = stop
    labels_B[start:] = dense_BN[start:] = lengths_FB[:, start:] = 0
    # A KeyedJaggedTensor is feature-major: all of the first feature's ids, then the second's.
    ids = [piece.sparse[f].ids for f in range(len(sparse)) for piece in pieces]
    values = np.concatenate(ids, dtype=np.int64) if ids else np.zeros(0, np.int64)
    return Batch(
        dense_features=torch.from_numpy(dense_BN),
        sparse_features=KeyedJaggedTensor(
            keys=list(sparse),
            values=torch.from_numpy(values),
            lengths=torch.from_numpy(lengths_FB.reshape(-1)),
            stride=batch_size,
        ),
        labels=torch.from_numpy(labels_B),
    )
