"""The three phases on one data set: pretrain with gates, prune, continue.

With a schedule of several prunes, the first two come in turn, each on its part of the rows.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import chain

import torch.distributed as dist
from torchrec.datasets.utils import Batch

from torchrec_fmp.agreement import broadcast_text
from torchrec_fmp.config import RunConfig
from torchrec_fmp.data.dataset import Source
from torchrec_fmp.data.reader import Reader
from torchrec_fmp.data.schema import Schema
from torchrec_fmp.gates.attach import feature_gates
from torchrec_fmp.job import Job, build_job
from torchrec_fmp.manifest import Manifest
from torchrec_fmp.metrics import Metrics, Predictions, predict
from torchrec_fmp.metrics_log import MetricsLog
from torchrec_fmp.models.backbone import table_name
from torchrec_fmp.outcome import Outcome
from torchrec_fmp.planning.costs import TableCost, table_costs
from torchrec_fmp.planning.planner import make_planner, run_topology
from torchrec_fmp.policies.selection import Selection
from torchrec_fmp.pretraining import Pretraining
from torchrec_fmp.pruning import prune
from torchrec_fmp.ranks import Ranks
from torchrec_fmp.rewinding import Snapshot
from torchrec_fmp.run_directory import RunDirectory
from torchrec_fmp.schedules.schedule import decide_prune
from torchrec_fmp.scores.feature_scores import FeatureScores
from torchrec_fmp.scores.size_curve import with_losses
from torchrec_fmp.train import Progress, Steps, total_progress, train
from torchrec_fmp.warmup import Warmup

_logger = logging.getLogger(__name__)


class Pipeline:
    """One run: its data and its phases.

    Args:
        config: what to run.
        ranks: the process group.
        directory: gets metrics.jsonl, selection.json and manifest.json (those of prunes before the
            last as selection-1.json and so on), each as soon as it is known; None for none.
        on_predictions: gets the name of a model (full, pruned or final) and what it predicts for
            the test split, the same rows in the same order for every model and seed.

    Raises:
        ValueError: if there are too few rows for the configured phases.
    """

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        directory: RunDirectory | None = None,
        on_predictions: Callable[[str, Predictions], None] | None = None,
    ) -> None:
        self._config = config
        self._ranks = ranks
        self._directory = directory
        self._on_predictions = on_predictions
        log_path = directory.file("metrics.jsonl") if directory and ranks.speaks else None
        self._log = MetricsLog(log_path, config.train.log_interval)
        self._schema = config.data.schema
        self._readers: list[Reader] = []
        self._train_source = config.data.source("train")
        self._test_source = config.data.source("test")
        self._rows = self._reader(self._train_source, self._schema).rows
        rows = sum(group.rows for group in self._train_source.row_groups)
        step = config.pretrain_batch_size * ranks.world_size
        self._pretrain_rows = config.pretrain.rows_of(rows) // step * step
        rest = (rows - self._pretrain_rows) // ranks.world_size
        if self._pretrain_rows == 0 or rest < config.train.batch_size:
            raise ValueError(
                f"of {rows} rows, {self._pretrain_rows} are for pretraining in batches of "
                f"{config.pretrain_batch_size} on each of {ranks.world_size} ranks, and each has "
                f"{rest} for going on in batches of {config.train.batch_size}: give more rows, a "
                "smaller batch_size, or another pretrain.fraction or pretrain.samples"
            )
        if self._prune_rows == 0:
            raise ValueError(
                f"the {self._pretrain_rows} rows of pretraining are not a batch of "
                f"{config.pretrain_batch_size} on each of {ranks.world_size} ranks for each of "
                f"{config.schedule.prunes} prunes: give more rows, a smaller pretrain.batch_size, "
                "or fewer prunes"
            )
        tables = [table_name(name) for name in self._schema.sparse_names]
        self._planner = make_planner(
            config.planner, tables, config.train.batch_size, ranks.device.type
        )
        self._snapshot: Snapshot | None = None
        self._selection: Selection | None = None
        self._manifests: list[Manifest] = []
        self._pretrained: list[Progress] = []
        self._trained_rows = 0
        # Of the first model, by which every prune decides.
        self._prices: dict[str, Mapping[str, float]] = {}
        self._table_costs: list[TableCost] | None = None
        self._metrics: dict[str, Metrics] = {}
        self._progress: dict[str, Progress] = {}
        self._seconds: dict[str, float] = {}

    def run(self) -> Outcome:
        """Runs the reference, where it is asked for, and the three phases.

        Raises:
            DataError: at input that cannot be trained on.
            ParityError: if the pruned model does not compute what the gated one does.
            TrainingDiverged: if a loss is not finite.
        """
        if self._config.reference:
            self._run_reference()
        job = self._build(gated=True)
        for number in range(1, self._config.schedule.prunes + 1):
            job = self._pretrain_and_prune(job, number)
        if self._config.continuation.start == "reinitialized":
            kept = job.schema
            del job
            with self._timed("prune"):
                job = self._build(gated=False, schema=kept)
        self._evaluate(job, "pruned")
        with self._timed("continue"):
            steps = self._config.continuation.warmup_steps
            warmup = Warmup(job.model, job.optimizer, steps) if steps else None
            self._train(job, "continue", self._continued(job.schema), warmup)
        self._evaluate(job, "final")
        assert self._selection is not None
        return Outcome(
            self._selection,
            self._manifests,
            self._metrics,
            self._progress,
            self._seconds,
            self._count_replaced(),
        )

    def _pretrain_and_prune(self, job: Job, number: int) -> Job:
        """Scores the features that are left and drops some; returns the smaller model.

        Args:
            job: gated.
            number: of the prune, from 1.
        """
        with self._timed("pretrain"):
            pretraining = self._pretraining(job, number)
            scores = self._config.scorer.score(pretraining)
            scores = with_losses(scores, self._config.policy, pretraining)
        self._take_snapshot(job, pretraining.trained_rows // pretraining.batch_size)
        self._pretrained += pretraining.progress
        self._progress["pretrain"] = total_progress(self._pretrained)
        self._trained_rows += pretraining.trained_rows
        with self._timed("prune"):
            selection = self._decide(scores, job, number)
            self._rewind(job, pretraining)
            # It holds the gated model, which is to be freed.
            del pretraining
            return self._prune(job, selection, number)

    def _run_reference(self) -> None:
        """Trains the model without gates on all rows, in their own order."""
        job = self._build(gated=False)
        with self._timed("full"):
            self._train(job, "full", [(self._reader(self._train_source, job.schema), 0)])
        self._evaluate(job, "full")

    def _build(self, gated: bool, schema: Schema | None = None) -> Job:
        return build_job(self._config, schema or self._schema, self._ranks, self._planner, gated)

    @cached_property
    def _chosen_and_rest(self) -> tuple[Source, Source]:
        """The training rows of pretraining, and all others."""
        config = self._config
        return config.pretrain.subset.split(
            self._train_source, self._schema, self._pretrain_rows, config.seed
        )

    @property
    def _prune_rows(self) -> int:
        """Of this rank, that are pretrained on for one prune, in whole batches."""
        batch_size = self._config.pretrain_batch_size
        batches = self._pretrain_rows // self._ranks.world_size // batch_size
        return batches // self._config.schedule.prunes * batch_size

    def _pretraining(self, job: Job, number: int = 1) -> Pretraining:
        """For the prune of that number, on the rows behind those that have been trained on."""
        batch_size, world_size = self._config.pretrain_batch_size, self._ranks.world_size
        chosen, rest = self._chosen_and_rest
        first = self._trained_rows

        def read(start: int, stop: int) -> Iterator[Batch]:
            reader = self._reader(chosen, job.schema)
            return reader.batches(batch_size, first + start, first + stop)

        def read_validation(rows: int) -> Iterable[Batch]:
            there_are = sum(group.rows for group in rest.row_groups)
            rows = min(rows, there_are) // (batch_size * world_size) * batch_size * world_size
            if not rows:
                return []
            seed = self._config.seed
            of_rest, _ = self._config.pretrain.subset.split(rest, self._schema, rows, seed)
            return self._reader(of_rest, job.schema).batches(batch_size)

        return Pretraining(
            job,
            self._ranks,
            read,
            read_validation,
            self._prune_rows,
            batch_size,
            self._config.seed,
            self._log,
            partial(self._take_snapshot, job),
            partial(self._config.schedule.share, number),
            self._prices,
            partial(self._decision, job, number),
        )

    def _take_snapshot(self, job: Job, step: int) -> None:
        """Keeps the weights that pretraining has before this step, if they are to be gone back to.

        It is called with the number of all steps at the end, too.
        """
        continuation = self._config.continuation
        if continuation.start == "rewound" and step == continuation.rewind_steps:
            self._snapshot = Snapshot(job.model)

    def _rewind(self, job: Job, pretraining: Pretraining) -> None:
        if self._config.continuation.start != "rewound":
            return
        if self._snapshot is None:
            steps = pretraining.trained_rows // pretraining.batch_size
            raise ValueError(
                f"continuation.rewind_steps is {self._config.continuation.rewind_steps}, and "
                f"pretraining took {steps} steps: rewind to one of them"
            )
        self._snapshot.restore(job)
        self._snapshot = None

    def _continued(self, schema: Schema) -> list[tuple[Reader, int]]:
        """Readers of the rows that pretraining has left over and of all others, and their starts.

        Args:
            schema: the columns to read.
        """
        chosen, rest = self._chosen_and_rest
        return [(self._reader(chosen, schema), self._trained_rows), (self._reader(rest, schema), 0)]

    def _train(
        self,
        job: Job,
        phase: str,
        readers: Sequence[tuple[Reader, int]],
        extra: Steps | None = None,
    ) -> None:
        """Trains on this rank's rows of each reader in turn, from a row on."""
        batch_size = self._config.train.batch_size
        self._progress[phase] = train(
            job.model,
            job.optimizer,
            chain.from_iterable(reader.batches(batch_size, start) for reader, start in readers),
            phase=phase,
            total=sum((reader.rows - start) // batch_size for reader, start in readers),
            ranks=self._ranks,
            log=self._log,
            extra=extra,
        )

    def _decide(self, scores: FeatureScores, job: Job, number: int) -> Selection:
        """Decides on rank 0 and sends the decision, so that every rank has the same.

        Returns:
            The decisions on the features that the model has.
        """
        text = self._decision(job, number, scores).to_json() if self._ranks.speaks else None
        text = broadcast_text(text, self._ranks.group, self._ranks.device)
        if self._directory:
            self._directory.write_text(self._file("selection", number), text)
        self._selection = Selection.from_json(text)
        decisions = self._selection.features
        return Selection({name: it for name, it in decisions.items() if name in scores.scores})

    def _decision(self, job: Job, number: int, scores: FeatureScores) -> Selection:
        """What the policy decides, on this rank, over all features that the first model had."""
        policy = self._config.policy
        if policy.cost_unit is not None and self._table_costs is None:
            self._table_costs = table_costs(
                job.model,
                run_topology(self._ranks.device.type),
                policy.cost_unit,
                batch_size=self._config.train.batch_size,
            )
        return decide_prune(
            scores,
            policy,
            self._config.schedule,
            number,
            earlier=self._selection,
            costs=self._table_costs,
        )

    def _prune(self, job: Job, selection: Selection, number: int) -> Job:
        """Prunes; what is to be pruned again gets new gates, like those that it had."""
        gates = next(module.config for _, module in feature_gates(job.model))
        pruned = prune(
            job.model,
            job.optimizer,
            selection,
            planner=self._planner,
            batch=self._first_test_batch(job.schema),
            tolerance=self._config.parity_tolerance,
            replan=self._config.replan,
            steps_left=(self._rows - self._trained_rows) // self._config.train.batch_size,
            move=self._config.move,
            gates=None if self._config.schedule.is_last(number) else gates,
        )
        self._manifests.append(pruned.manifest)
        if self._directory:
            self._directory.write_json(self._file("manifest", number), pruned.manifest.describe())
        return Job(pruned.model, pruned.optimizer, job.schema.only(selection.kept))

    def _file(self, name: str, number: int) -> str:
        """Where a prune's file goes: the last one's has no number."""
        return f"{name}.json" if self._config.schedule.is_last(number) else f"{name}-{number}.json"

    def _first_test_batch(self, schema: Schema) -> Batch:
        reader = self._reader(self._test_source, schema)
        batch, _ = next(reader.padded_batches(self._config.train.batch_size))
        return batch.to(self._ranks.device)

    def _evaluate(self, job: Job, name: str) -> None:
        reader = self._reader(self._test_source, job.schema)
        batches = reader.padded_batches(self._config.train.batch_size)
        predictions = predict(job.model, batches, self._ranks)
        self._metrics[name] = predictions.metrics()
        if self._on_predictions is not None:
            self._on_predictions(name, predictions)

    def _reader(self, source: Source, schema: Schema) -> Reader:
        config = self._config
        reader = Reader(
            source,
            schema,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            seed=config.seed,
            shuffle=config.train.shuffle and source is not self._test_source,
            bad_input=config.train.bad_input,
            workers=config.train.workers,
        )
        self._readers.append(reader)
        return reader

    def _count_replaced(self) -> Counter[tuple[str, str]]:
        mine: Counter[tuple[str, str]] = Counter()
        for reader in self._readers:
            mine.update(reader.replaced)
        counts: list[Counter[tuple[str, str]]] = [Counter()] * self._ranks.world_size
        dist.all_gather_object(counts, mine, group=self._ranks.group)
        return sum(counts, Counter())

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        if self._ranks.speaks:
            _logger.info("%s", phase)
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
