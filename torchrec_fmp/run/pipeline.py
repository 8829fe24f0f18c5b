"""The three phases on one data set: pretrain with gates, prune, continue.

With a schedule of several prunes, the first two alternate, on one part of the rows per prune.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain

from torchrec_fmp.data.schema import Schema
from torchrec_fmp.distributed.agreement import broadcast_text
from torchrec_fmp.distributed.ranks import Ranks
from torchrec_fmp.gates.attach import feature_gates
from torchrec_fmp.loggers.jsonl import MetricsLog
from torchrec_fmp.models.backbone import table_name
from torchrec_fmp.planning.planner import make_planner, run_topology
from torchrec_fmp.planning.pricing import table_costs
from torchrec_fmp.pruning.prune import prune
from torchrec_fmp.run.config import RunConfig
from torchrec_fmp.run.continuation import Snapshot
from torchrec_fmp.run.directory import RunDirectory
from torchrec_fmp.run.outcome import Outcome
from torchrec_fmp.run.rows import RunRows, Stretch
from torchrec_fmp.run.state import Phase, RunState
from torchrec_fmp.scorers.pretraining import Pretraining, PruneContext
from torchrec_fmp.scorers.size_curve import with_losses
from torchrec_fmp.selection.feature_scores import FeatureScores
from torchrec_fmp.selection.schedules.schedule import decide_prune
from torchrec_fmp.selection.selection import Selection
from torchrec_fmp.training.job import Job, build_job
from torchrec_fmp.training.metrics import Predictions, predict
from torchrec_fmp.training.train import Steps, train
from torchrec_fmp.training.warmup import Warmup

_logger = logging.getLogger(__name__)


class Pipeline:
    """One run: its data and its phases.

    Args:
        config: configuration of the run.
        ranks: process group.
        directory: run directory for metrics.jsonl, selection.json and manifest.json, each written
            as soon as its content is known. Prunes before the last write selection-1.json and so
            on. None writes no files.
        on_predictions: callback for the name of a model (full, pruned or final) and its predictions
            on the test split, with the same rows in the same order for every model and seed.

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
        self._rows = RunRows(config, ranks)
        tables = [table_name(name) for name in self._rows.schema.sparse_names]
        self._planner = make_planner(
            config.planner, tables, config.train.batch_size, ranks.device.type
        )
        self.state = RunState()
        self._snapshot: Snapshot | None = None

    def run(self) -> Outcome:
        """Trains the reference, if the config asks for one, and runs the three phases.

        Raises:
            DataError: if the input cannot be trained on.
            ParityError: if the outputs of the pruned and the gated model differ.
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
        self._continue(job)
        self._evaluate(job, "final")
        self.state.phase = "done"
        self.state.replaced = self._rows.count_replaced()
        return Outcome(self.state)

    def _run_reference(self) -> None:
        """Trains the full model, without gates, on all rows in their own order."""
        job = self._build(gated=False)
        with self._timed("full"):
            self._train(job, "full", self._rows.whole(job.schema))
        self._evaluate(job, "full")

    def _pretrain_and_prune(self, job: Job, number: int) -> Job:
        """Scores the remaining features and drops some; returns the smaller model.

        Args:
            job: job with the gated model.
            number: number of the prune, from 1.
        """
        with self._timed("pretrain"):
            pretraining = self._pretraining(job, number)
            scores = self._config.scorer.score(pretraining)
            scores = with_losses(scores, self._config.policy, pretraining)
        self._take_snapshot(job, pretraining.trained_rows // pretraining.batch_size)
        self.state.progress.setdefault("pretrain", []).extend(pretraining.progress)
        self.state.rows["pretrain"] += pretraining.trained_rows
        with self._timed("prune"):
            selection = self._decide(scores, job, number)
            self._rewind(job, pretraining)
            # `pretraining` holds the gated model, which must be freed.
            del pretraining
            return self._prune(job, selection, number)

    def _continue(self, job: Job) -> None:
        with self._timed("continue"):
            steps = self._config.continuation.warmup_steps
            warmup = Warmup(job.model, job.optimizer, steps) if steps else None
            rows = self._rows.continued(job.schema, self.state.rows["pretrain"])
            self._train(job, "continue", rows, warmup)

    def _build(self, gated: bool, schema: Schema | None = None) -> Job:
        config = self._config
        return build_job(
            config.model,
            schema or self._rows.schema,
            config.train,
            config.seed,
            ranks=self._ranks,
            planner=self._planner,
            gates=config.gates if gated else None,
        )

    def _pretraining(self, job: Job, number: int = 1) -> Pretraining:
        """Pretraining for the prune of that number, on the next untrained rows."""
        return Pretraining(
            job,
            self._ranks,
            self._rows.pretraining(job.schema, self.state.rows["pretrain"]),
            self._config.seed,
            self._log,
            PruneContext(
                share=partial(self._config.schedule.share, number),
                decide=partial(self._decision, job, number),
                costs=self.state.costs,
            ),
            before_step=partial(self._take_snapshot, job),
        )

    def _train(
        self, job: Job, phase: Phase, rows: Sequence[Stretch], extra: Steps | None = None
    ) -> None:
        """Trains on this rank's rows of each stretch in turn."""
        batch_size = self._config.train.batch_size
        progress = train(
            job.model,
            job.optimizer,
            chain.from_iterable(stretch.batches(batch_size) for stretch in rows),
            phase=phase,
            total=sum(stretch.steps(batch_size) for stretch in rows),
            ranks=self._ranks,
            log=self._log,
            extra=extra,
        )
        self.state.progress[phase] = [progress]
        self.state.rows[phase] += progress.steps * batch_size

    def _take_snapshot(self, job: Job, step: int) -> None:
        """Keeps the weights from before this pretraining step, if the run rewinds to them.

        After pretraining, it is called again with the total number of steps.
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
                f"continuation.rewind_steps is {self._config.continuation.rewind_steps}, but "
                f"pretraining took {steps} steps: rewind to one of them"
            )
        self._snapshot.restore(job)
        self._snapshot = None

    def _decide(self, scores: FeatureScores, job: Job, number: int) -> Selection:
        """Decides on rank 0 and broadcasts the decision, so that every rank has the same one.

        Returns:
            The decisions on the features that the model still has.
        """
        text = self._decision(job, number, scores).to_json() if self._ranks.speaks else None
        text = broadcast_text(text, self._ranks.group, self._ranks.device)
        if self._directory:
            self._directory.write_text(self._file("selection", number), text)
        selection = Selection.from_json(text)
        self.state.selections.append(selection)
        decisions = selection.features
        return Selection({name: it for name, it in decisions.items() if name in scores.scores})

    def _decision(self, job: Job, number: int, scores: FeatureScores) -> Selection:
        """The policy's decision, on this rank, over all features of the full model."""
        policy = self._config.policy
        if policy.cost_unit is not None and self.state.table_costs is None:
            self.state.table_costs = table_costs(
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
            earlier=self.state.selection,
            costs=self.state.table_costs,
        )

    def _prune(self, job: Job, selection: Selection, number: int) -> Job:
        """Prunes; a model that will be pruned again gets new gates, like its old ones."""
        gates = next(module.config for _, module in feature_gates(job.model))
        rows_left = self._rows.per_rank - self.state.rows["pretrain"]
        batch, _ = next(self._rows.test_batches(job.schema))
        pruned = prune(
            job.model,
            job.optimizer,
            selection,
            planner=self._planner,
            batch=batch.to(self._ranks.device),
            tolerance=self._config.parity_tolerance,
            replan=self._config.replan,
            steps_left=rows_left // self._config.train.batch_size,
            move=self._config.move,
            gates=None if self._config.schedule.is_last(number) else gates,
        )
        manifest = pruned.manifest.describe()
        self.state.manifests.append(manifest)
        self.state.prunes = number
        if self._directory:
            self._directory.write_json(self._file("manifest", number), manifest)
        return Job(pruned.model, pruned.optimizer, job.schema.only(selection.kept))

    def _file(self, name: str, number: int) -> str:
        """Name of a prune's file; the last prune's file has no number."""
        return f"{name}.json" if self._config.schedule.is_last(number) else f"{name}-{number}.json"

    def _evaluate(self, job: Job, name: str) -> None:
        predictions = predict(job.model, self._rows.test_batches(job.schema), self._ranks)
        self.state.metrics[name] = predictions.metrics()
        if self._on_predictions is not None:
            self._on_predictions(name, predictions)

    @contextmanager
    def _timed(self, phase: Phase) -> Iterator[None]:
        self.state.phase = phase
        if self._ranks.speaks:
            _logger.info("%s", phase)
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self.state.seconds[phase] = self.state.seconds.get(phase, 0.0) + seconds
