"""The reader: one rank's share of a source, as batches."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
from torchrec.datasets.utils import Batch

from torchrec_fmp.data.batch import Rows, make_batch
from torchrec_fmp.data.columns import BadInput, decode
from torchrec_fmp.data.dataset import Source
from torchrec_fmp.data.division import Segment, divide, quotas
from torchrec_fmp.data.errors import DataError
from torchrec_fmp.data.schema import Schema


@dataclass(frozen=True)
class _Stretch:
    """The rows at positions [start, stop) of a segment, in reading order."""

    segment: Segment
    start: int
    stop: int


class Reader:
    """Reads one rank's share of a source.

    Row groups are divided among ranks so that each rank has its exact share of the rows. The
    row order depends only on the source, the world size, `seed` and `shuffle`, not on the batch
    size, the number of workers, or where reading starts.

    Args:
        source: source of the rows.
        schema: columns to read.
        rank: rank whose share is read.
        world_size: number of ranks.
        seed: seed of the shuffle.
        shuffle: whether to permute the row groups and the rows within each; otherwise rows keep
            the source's order.
        bad_input: action for a value that cannot be trained on: raise, or replace and count it.
        workers: number of threads that decode ahead, one row group each; with 0, the calling thread
            decodes.

    Raises:
        ValueError: if rank, world size, seed or workers are out of range.
        DataError: if the source has no rows.
    """

    def __init__(
        self,
        source: Source,
        schema: Schema,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = False,
        bad_input: BadInput = "raise",
        workers: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; it must be in [0, {world_size})")
        if workers < 0 or seed < 0:
            raise ValueError(f"workers is {workers} and seed is {seed}; both must be at least 0")
        self._source = source
        self._schema = schema
        self._seed = seed
        self._shuffle = shuffle
        self._bad_input: BadInput = bad_input
        self._workers = workers
        self._groups = source.row_groups
        group_rows = [group.rows for group in self._groups]
        self._quotas = quotas(sum(group_rows), world_size)
        if not self._quotas[0]:
            names = {group.file for group in self._groups}
            raise DataError(
                "there are no rows to read",
                file=", ".join(sorted(names)) or "an empty list of files",
                remedy="Check the paths of this split.",
            )
        order = np.arange(len(group_rows))
        if shuffle:
            order = np.random.default_rng(seed).permutation(order)
        self._segments = divide(group_rows, world_size, order.tolist())[rank]
        self.replaced: Counter[tuple[str, str]] = Counter()
        """Number of replaced values for each (column, problem) in the rows read so far."""

    @property
    def rows(self) -> int:
        """The number of rows on every rank; some ranks have one more."""
        return self._quotas[-1]

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Full batches of this rank's rows [start, stop), the same number on every rank.

        Rows that do not fill the last batch are not read. Row groups before `start` are skipped
        without decoding.

        Args:
            batch_size: B, number of rows in a batch.
            start: first row, counted in this rank's order.
            stop: end of the rows, at most `rows`; None means `rows`.

        Yields:
            Batches with dense_features (B, N) float32, sparse_features of int64 values and int32
            lengths, labels (B,) float32.

        Raises:
            ValueError: if batch_size is below 1, or not 0 <= start <= stop <= rows.
            DataError: at a row that cannot be read or has a bad value.
        """
        stop = self.rows if stop is None else stop
        _check_batch_size(batch_size)
        if not 0 <= start <= stop <= self.rows:
            raise ValueError(
                f"rows {start} to {stop} were requested, but a rank has rows 0 to {self.rows}"
            )
        full = start + (stop - start) // batch_size * batch_size
        return (batch for batch, _ in self._batches(batch_size, start, full))

    def padded_batches(self, batch_size: int) -> Iterator[tuple[Batch, int]]:
        """All of this rank's rows, the same number of batches on every rank.

        The last batches are padded with rows of label 0, dense values 0 and empty bags, because
        a sharded model's forward is collective: every rank must call it the same number of times.

        Yields:
            A batch of exactly `batch_size` rows, as from `batches`, and the number of real rows.

        Raises:
            ValueError: if batch_size is below 1.
            DataError: at a row that cannot be read or has a bad value.
        """
        _check_batch_size(batch_size)
        return self._padded_batches(batch_size)

    def _padded_batches(self, batch_size: int) -> Iterator[tuple[Batch, int]]:
        own = sum(segment.rows for segment in self._segments)
        yield from self._batches(batch_size, 0, own)
        for _ in range(-(-own // batch_size), -(-self._quotas[0] // batch_size)):
            yield self._batch([], batch_size), 0

    def _batches(self, batch_size: int, start: int, stop: int) -> Iterator[tuple[Batch, int]]:
        with closing(self._load_all(self._stretches(start, stop))) as chunks:
            for pieces in _cut(chunks, batch_size):
                yield self._batch(pieces, batch_size), sum(map(len, pieces))

    def _batch(self, pieces: list[Rows], batch_size: int) -> Batch:
        return make_batch(pieces, batch_size, self._schema.dense, self._schema.sparse_names)

    def _stretches(self, start: int, stop: int) -> Iterator[_Stretch]:
        first = 0
        for segment in self._segments:
            begin, end = max(start - first, 0), min(stop - first, segment.rows)
            if begin < end:
                yield _Stretch(segment, begin, end)
            first += segment.rows

    def _load_all(self, stretches: Iterable[_Stretch]) -> Generator[Rows, None, None]:
        loaded = self._load_ahead(stretches) if self._workers else map(self._load, stretches)
        for rows in loaded:
            # Counted here, in order, so that rows decoded ahead but never used are not counted.
            self.replaced.update(rows.replaced)
            yield rows

    def _load_ahead(self, stretches: Iterable[_Stretch]) -> Iterator[Rows]:
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="reader")
        pending: deque[Future[Rows]] = deque()
        try:
            for stretch in stretches:
                pending.append(pool.submit(self._load, stretch))
                if len(pending) > self._workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _load(self, stretch: _Stretch) -> Rows:
        segment = stretch.segment
        group = self._groups[segment.group]
        table = self._source.read_whole(group)
        row_numbers = self._source.row_numbers(group)
        if self._shuffle:
            generator = np.random.default_rng([self._seed, segment.group, segment.start])
            places = segment.start + generator.permutation(segment.rows)
            places = places[stretch.start : stretch.stop]
            table = pc.take(table, places, boundscheck=False)
            row_numbers = row_numbers[places]
        else:
            start, stop = segment.start + stretch.start, segment.start + stretch.stop
            table = table.slice(start, stop - start)
            row_numbers = row_numbers[start:stop]
        return decode(
            table,
            self._schema,
            file=group.file,
            row_numbers=row_numbers,
            bad_input=self._bad_input,
        )


def _cut(chunks: Iterable[Rows], batch_size: int) -> Iterator[list[Rows]]:
    """Yields the pieces of each batch; only the last may have fewer rows than `batch_size`."""
    held: list[Rows] = []
    missing = batch_size
    for chunk in chunks:
        start = 0
        while start < len(chunk):
            piece = chunk.slice(start, min(start + missing, len(chunk)))
            held.append(piece)
            start += len(piece)
            missing -= len(piece)
            if not missing:
                yield held
                held, missing = [], batch_size
    if held:
        yield held


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
