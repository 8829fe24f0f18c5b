"""`RunRows`: which rows a run reads, when, and in which batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch.distributed as dist
from torchrec.datasets.utils import Batch

from torchrec_fmp.data.dataset import Source
from torchrec_fmp.data.reader import Reader
from torchrec_fmp.data.schema import Schema
from torchrec_fmp.distributed.ranks import Ranks
from torchrec_fmp.run.config import RunConfig
from torchrec_fmp.scorers.pretraining import PretrainingRows


@dataclass(frozen=True)
class Stretch:
    """This rank's rows of a reader, from a given row to the end.

    Args:
        reader: reader of the rows.
        start: first row, counted in this rank's order.
    """

    reader: Reader
    start: int = 0

    def batches(self, batch_size: int) -> Iterator[Batch]:
        return self.reader.batches(batch_size, self.start)

    def steps(self, batch_size: int) -> int:
        """Number of batches."""
        return (self.reader.rows - self.start) // batch_size


class _Split(NamedTuple):
    """The training rows: the rows chosen for pretraining, and the rest."""

    chosen: Source
    rest: Source


class RunRows:
    """The rows of a run, divided among its phases and ranks.

    Args:
        config: configuration of the run.
        ranks: process group.

    Raises:
        ValueError: if there are too few rows for the configured phases.
        DataError: if the data cannot be read.
    """

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self._config = config
        self._ranks = ranks
        self._readers: list[Reader] = []
        self.schema = config.data.schema
        self._train_source = config.data.source("train")
        self._test_source = config.data.source("test")
        self.per_rank = self._reader(self._train_source, self.schema).rows
        """Number of training rows that every rank has."""
        rows = self._train_source.total_rows
        step = config.pretrain_batch_size * ranks.world_size
        self._pretrain_rows = config.pretrain.rows_of(rows) // step * step
        self._check(rows)

    @property
    def per_prune(self) -> int:
        """Number of this rank's pretraining rows for one prune, in whole batches."""
        batch_size = self._config.pretrain_batch_size
        batches = self._pretrain_rows // self._ranks.world_size // batch_size
        return batches // self._config.schedule.prunes * batch_size

    def whole(self, schema: Schema) -> list[Stretch]:
        """All training rows, in their own order."""
        return [Stretch(self._reader(self._train_source, schema))]

    def pretraining(self, schema: Schema, first: int) -> PretrainingRows:
        """The pretraining rows of one prune.

        Args:
            schema: columns to read.
            first: first row, counted in this rank's pretraining rows.
        """
        batch_size = self._config.pretrain_batch_size

        def read(start: int, stop: int) -> Iterator[Batch]:
            reader = self._reader(self._split.chosen, schema)
            return reader.batches(batch_size, first + start, first + stop)

        def read_validation(rows: int) -> Iterable[Batch]:
            step = batch_size * self._ranks.world_size
            rows = min(rows, self._split.rest.total_rows) // step * step
            if not rows:
                return []
            subset, seed = self._config.pretrain.subset, self._config.seed
            of_rest, _ = subset.split(self._split.rest, self.schema, rows, seed)
            return self._reader(of_rest, schema).batches(batch_size)

        return PretrainingRows(read, read_validation, self.per_prune, batch_size)

    def continued(self, schema: Schema, first: int) -> list[Stretch]:
        """The rows for continued training: pretraining rows left over, and all other rows.

        Args:
            schema: columns to read.
            first: number of this rank's rows that pretraining has trained on.
        """
        return [
            Stretch(self._reader(self._split.chosen, schema), first),
            Stretch(self._reader(self._split.rest, schema)),
        ]

    def test_batches(self, schema: Schema) -> Iterator[tuple[Batch, int]]:
        """The test split, each batch with its number of real rows."""
        reader = self._reader(self._test_source, schema)
        return reader.padded_batches(self._config.train.batch_size)

    def count_replaced(self) -> Counter[tuple[str, str]]:
        """(column, problem) -> bad values replaced in all passes, over all ranks. Collective."""
        mine: Counter[tuple[str, str]] = Counter()
        for reader in self._readers:
            mine.update(reader.replaced)
        counts: list[Counter[tuple[str, str]]] = [Counter()] * self._ranks.world_size
        dist.all_gather_object(counts, mine, group=self._ranks.group)
        return sum(counts, Counter())

    @cached_property
    def _split(self) -> _Split:
        config = self._config
        subset = config.pretrain.subset
        return _Split(
            *subset.split(self._train_source, self.schema, self._pretrain_rows, config.seed)
        )

    def _check(self, rows: int) -> None:
        config, world_size = self._config, self._ranks.world_size
        rest = (rows - self._pretrain_rows) // world_size
        if self._pretrain_rows == 0 or rest < config.train.batch_size:
            raise ValueError(
                f"{rows} rows are too few: {self._pretrain_rows} are for pretraining in batches of "
                f"{config.pretrain_batch_size} on each of {world_size} ranks, which leaves {rest} "
                f"rows per rank for continued training, and batch_size is "
                f"{config.train.batch_size}. Give more rows, a smaller batch_size, or another "
                "pretrain.fraction or pretrain.samples"
            )
        if self.per_prune == 0:
            raise ValueError(
                f"the {self._pretrain_rows} pretraining rows are fewer than a batch of "
                f"{config.pretrain_batch_size} on each of {world_size} ranks for each of "
                f"{config.schedule.prunes} prunes: give more rows, a smaller pretrain.batch_size, "
                "or fewer prunes"
            )

    def _reader(self, source: Source, schema: Schema) -> Reader:
        train = self._config.train
        reader = Reader(
            source,
            schema,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            seed=self._config.seed,
            shuffle=train.shuffle and source is not self._test_source,
            bad_input=train.bad_input,
            workers=train.workers,
        )
        self._readers.append(reader)
        return reader
