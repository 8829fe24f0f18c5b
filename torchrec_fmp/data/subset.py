"""Chooses the rows for pretraining: the first, random, stratified, or similar to recent rows."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from torchrec_fmp.data.batch import Ids, Rows
from torchrec_fmp.data.columns import decode, hash_string
from torchrec_fmp.data.dataset import RowGroup, Source
from torchrec_fmp.data.schema import Schema

Mask = npt.NDArray[np.bool_]

# As in the DSIR paper.
_BUCKETS = 10_000


class Subset(abc.ABC):
    """Chooses the rows for pretraining; the rest are trained on later."""

    def split(self, source: Source, schema: Schema, rows: int, seed: int) -> tuple[Source, Source]:
        """The chosen rows and all others, each in source order.

        Every row is in exactly one of the two. The result depends on the arguments alone, so it is
        the same on every rank.

        Args:
            source: all rows, oldest first.
            schema: columns of the rows.
            rows: number of rows to choose.
            seed: seed of the choice.

        Raises:
            ValueError: if `rows` is below 1, or exceeds the number of rows in the source.
            DataError: if the choice requires reading the source, and it cannot be read.
        """
        total = source.total_rows
        if not 0 < rows <= total:
            raise ValueError(
                f"{rows} rows cannot be chosen for pretraining out of {total}; choose 1 to {total}"
            )
        chosen = self.choose(source, schema, rows, seed)
        return _MaskedSource(source, chosen), _MaskedSource(source, ~chosen)

    @abc.abstractmethod
    def choose(self, source: Source, schema: Schema, rows: int, seed: int) -> Mask:
        """(rows of the source,) mask, true for exactly `rows` rows; arguments as for `split`."""


class Prefix(Subset):
    """The first rows. Reads nothing."""

    def choose(self, source: Source, schema: Schema, rows: int, seed: int) -> Mask:
        return _mask(source, np.arange(rows))


class Random(Subset):
    """Rows drawn with equal probability, without replacement. Reads nothing."""

    def choose(self, source: Source, schema: Schema, rows: int, seed: int) -> Mask:
        total = source.total_rows
        random = np.random.default_rng(seed)
        return _mask(source, random.choice(total, rows, replace=False, shuffle=False))


class Stratified(Subset):
    """Random rows, with the same share of each label in each time block as of all rows.

    Reads the source once, for the labels. If shares are not whole numbers of rows, the shares with
    the largest fractions are rounded up.

    Args:
        blocks: number of time blocks, with equally many rows each.

    Raises:
        ValueError: if blocks is below 1.
    """

    def __init__(self, blocks: int = 10) -> None:
        if blocks < 1:
            raise ValueError(f"blocks is {blocks}; it must be at least 1")
        self.blocks = blocks

    def choose(self, source: Source, schema: Schema, rows: int, seed: int) -> Mask:
        # A schema needs at least one sparse column; the others need not be decoded.
        label_only = schema.only(schema.sparse_names[:1])
        labels = np.concatenate([part.labels == 1 for part in _decoded(source, label_only)])
        edges = len(labels) * np.arange(self.blocks + 1) // self.blocks
        strata = [
            start + np.flatnonzero(labels[start:stop] == label)
            for start, stop in zip(edges[:-1], edges[1:], strict=True)
            for label in (False, True)
        ]
        random = np.random.default_rng(seed)
        chosen = [
            random.choice(stratum, size, replace=False, shuffle=False)
            for stratum, size in zip(strata, _apportion(rows, strata), strict=True)
        ]
        return _mask(source, np.concatenate(chosen))


class RecentResampling(Subset):
    """Rows similar to the most recent ones: importance resampling without replacement.

    DSIR (Xie et al. 2023, "Data selection for language models via importance resampling",
    arXiv:2302.03169; p-lambda/dsir, data_selection/hashed_ngram_dsir.py and base.py), with field
    values instead of n-grams: every (sparse feature, value) is hashed into one of 10,000 buckets,
    and a row is a bag of buckets. The log weight of a row is the sum over its buckets of
    log p_recent - log p_all, the log shares of a bucket among the recent rows and among all rows.
    Gumbel noise is added to the log weights, and the rows with the largest sums are chosen. This
    samples without replacement by weight.

    Counts start at 1, whereas the official code adds 1e-8 to shares: the recent rows are few, and
    a rare value that happens to be missing from them should not rule a row out. Dense features are
    ignored.

    Reads the source twice, for the shares and for the weights, and holds one float64 per row.

    Args:
        recent: share of the rows, at the end of the source, that the chosen rows should resemble.

    Raises:
        ValueError: if `recent` is not between 0 and 1.
    """

    def __init__(self, recent: float = 0.1) -> None:
        if not 0 < recent < 1:
            raise ValueError(f"recent is {recent}; it must be between 0 and 1")
        self.recent = recent

    def choose(self, source: Source, schema: Schema, rows: int, seed: int) -> Mask:
        sparse = schema.only(schema.sparse_names)
        log_ratio = self._log_ratio(source, sparse)
        log_weights = np.concatenate(
            [_sum_by_row(part, sparse, log_ratio) for part in _decoded(source, sparse)]
        )
        log_weights += np.random.default_rng(seed).gumbel(size=len(log_weights))
        return _mask(source, np.argpartition(log_weights, -rows)[-rows:])

    def _log_ratio(self, source: Source, schema: Schema) -> npt.NDArray[np.float64]:
        """(buckets,) log ratio of a bucket's share among the recent rows to its share among all."""
        total = source.total_rows
        first_recent = total - max(1, round(self.recent * total))
        counts = np.ones((2, _BUCKETS), np.int64)
        start = 0
        for part in _decoded(source, schema):
            for buckets, row in _bags_of_buckets(part, schema):
                recent = buckets[start + row >= first_recent]
                counts[0] += np.bincount(recent, minlength=_BUCKETS)
                counts[1] += np.bincount(buckets, minlength=_BUCKETS)
            start += len(part)
        log_share = np.log(counts) - np.log(counts.sum(1, keepdims=True))
        return log_share[0] - log_share[1]


class _MaskedSource(Source):
    """The rows of another source where a mask is true; row groups without such rows are left out.

    A row group's `index` is its position among all row groups of the other source.
    """

    def __init__(self, source: Source, mask: Mask) -> None:
        self._source = source
        self._whole_groups = source.row_groups
        ends = np.cumsum([group.rows for group in self._whole_groups])
        self._masks = np.split(mask, ends[:-1])
        self._groups = [
            RowGroup(whole.file, index, whole.first_row + int(part.argmax()), int(part.sum()))
            for index, (whole, part) in enumerate(zip(self._whole_groups, self._masks, strict=True))
            if part.any()
        ]

    @property
    def row_groups(self) -> Sequence[RowGroup]:
        return self._groups

    def read(self, group: RowGroup) -> pa.Table:
        table = self._source.read_whole(self._whole_groups[group.index])
        mask = self._masks[group.index]
        return table if mask.all() else table.filter(pa.array(mask))

    def row_numbers(self, group: RowGroup) -> npt.NDArray[np.int64]:
        numbers = self._source.row_numbers(self._whole_groups[group.index])
        return numbers[self._masks[group.index]]


def _mask(source: Source, chosen: npt.NDArray[np.int64]) -> Mask:
    mask = np.zeros(source.total_rows, np.bool_)
    mask[chosen] = True
    return mask


def _decoded(source: Source, schema: Schema) -> Iterator[Rows]:
    """The rows of each row group. Bad values do not matter before they are trained on."""
    for group in source.row_groups:
        yield decode(
            source.read_whole(group),
            schema,
            file=group.file,
            row_numbers=source.row_numbers(group),
            bad_input="replace",
        )


def _apportion(rows: int, strata: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """Divides `rows` among strata in proportion to their sizes, by largest remainder."""
    sizes = np.array([len(stratum) for stratum in strata])
    shares, remainders = np.divmod(rows * sizes, sizes.sum())
    missing = rows - shares.sum()
    shares[np.argsort(-remainders, kind="stable")[:missing]] += 1
    return shares


def _bags_of_buckets(
    part: Rows, schema: Schema
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """For each sparse feature, the bucket and the row of each of its values."""
    rows = np.arange(len(part))
    for name, bags in zip(schema.sparse_names, part.sparse, strict=True):
        lengths = 1 if bags.offsets is None else np.diff(bags.offsets)
        yield _hash(name, bags.ids), np.repeat(rows, lengths)


def _sum_by_row(
    part: Rows, schema: Schema, values: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """(rows,) sum over each row's buckets of `values`, which has one entry per bucket."""
    sums = np.zeros(len(part))
    for buckets, row in _bags_of_buckets(part, schema):
        sums += np.bincount(row, values[buckets], minlength=len(part))
    return sums


def _hash(feature: str, ids: Ids) -> npt.NDArray[np.int64]:
    """The bucket of each value: SplitMix64's mixer, on ids shifted by the feature's hash."""
    mixed = ids.astype(np.uint64) + np.uint64(hash_string(feature.encode(), 2**64))
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((mixed ^ (mixed >> np.uint64(31))) % np.uint64(_BUCKETS)).astype(np.int64)
