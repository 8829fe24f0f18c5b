"""`Pretraining`: the model and rows that a scorer works with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from torchrec.datasets.utils import Batch

from torchrec_fmp.distributed.ranks import Ranks
from torchrec_fmp.gates.attach import feature_gates
from torchrec_fmp.gates.feature_gates import FeatureGates
from torchrec_fmp.loggers.jsonl import MetricsLog
from torchrec_fmp.planning.planner import run_topology
from torchrec_fmp.planning.pricing import costs
from torchrec_fmp.selection.costs import BudgetUnit
from torchrec_fmp.selection.feature_scores import FeatureScores
from torchrec_fmp.selection.policies.closed_gates import ClosedGates
from torchrec_fmp.selection.policies.policy import decide as decide_by
from torchrec_fmp.selection.selection import Selection
from torchrec_fmp.training.job import Job
from torchrec_fmp.training.train import Progress, Steps, train


@dataclass(frozen=True)
class PretrainingRows:
    """The rows that features are selected on.

    Args:
        read: function (start, stop) -> batches of this rank's pretraining rows.
        read_validation: function from a number of rows over all ranks to batches of this rank's
            share. The rows are outside of pretraining; if there are fewer, all of them are read.
        count: number of this rank's pretraining rows.
        batch_size: rows per step on each rank, and per batch read.
    """

    read: Callable[[int, int], Iterable[Batch]]
    read_validation: Callable[[int], Iterable[Batch]]
    count: int
    batch_size: int


@dataclass(frozen=True)
class PruneContext:
    """The share that the next prune keeps, and how features are selected for it.

    Args:
        share: function from the share of all that the last prune keeps to the share that the next
            prune keeps.
        decide: function from scores to the selection that the run's policy would make now.
        costs: unit -> feature -> cost in the full model; missing units are added when first used.
    """

    share: Callable[[float], float] = float
    decide: Callable[[FeatureScores], Selection] = partial(decide_by, policy=ClosedGates())
    costs: dict[str, Mapping[str, float]] = field(default_factory=dict)


class Pretraining:
    """A gated model before feature selection, and the rows that features are selected on.

    With several prunes, each prune has a `Pretraining` with its part of the rows.

    Args:
        job: sharded model with gates, which are opened, and its optimizer.
        ranks: process group.
        rows: rows for pretraining and validation.
        seed: seed of the run.
        log: log that receives the training losses.
        prune: prune that follows this pretraining.
        before_step: callback before each training step; receives the step's number, from 0.
    """

    def __init__(
        self,
        job: Job,
        ranks: Ranks,
        rows: PretrainingRows,
        seed: int,
        log: MetricsLog,
        prune: PruneContext | None = None,
        before_step: Callable[[int], None] | None = None,
    ) -> None:
        self.job = job
        self.ranks = ranks
        self.rows = rows.count
        self.batch_size = rows.batch_size
        self.seed = seed
        self._rows = rows
        self._log = log
        self._prune = prune or PruneContext()
        self._before_step = before_step
        self.trained_rows = 0
        self.progress: list[Progress] = []
        for module in self.gates:
            module.set_open(True)

    @property
    def share(self) -> Callable[[float], float]:
        """Function from the last prune's share of all to the next prune's share."""
        return self._prune.share

    @property
    def decide(self) -> Callable[[FeatureScores], Selection]:
        """Function from scores to the selection that the run's policy would make now."""
        return self._prune.decide

    @property
    def gates(self) -> list[FeatureGates]:
        """All gates of the model, one module per collection and dense input."""
        return [module for _, module in feature_gates(self.job.model)]

    @property
    def steps(self) -> int:
        """Number of batches in the pretraining rows."""
        return self.rows // self.batch_size

    def costs(self, unit: BudgetUnit) -> Mapping[str, float]:
        """Feature -> cost of keeping it in the full model, under that model's plan.

        Includes features that were already dropped; see `torchrec_fmp.costs`. In `features`, each
        cost is 1.
        """
        if unit not in self._prune.costs:
            self._prune.costs[unit] = self._costs(unit)
        return self._prune.costs[unit]

    def _costs(self, unit: BudgetUnit) -> dict[str, float]:
        if unit == "features":
            return {name: 1.0 for gates in self.gates for name in gates.features}
        topology = run_topology(self.ranks.device.type)
        return costs(self.job.model, topology, unit, batch_size=self.batch_size)

    def batches(self, steps: int | None = None) -> Iterator[Batch]:
        """The first batches of pretraining, by default all, on the device, without training."""
        stop = self.batch_size * (self.steps if steps is None else steps)
        for batch in self._rows.read(0, stop):
            yield batch.to(self.ranks.device)

    def validation_batches(self, rows: int) -> Iterator[Batch]:
        """Batches on the device, about `rows` rows over all ranks that pretraining never reads.

        The rows belong to the next phase, which trains on them later.
        """
        for batch in self._rows.read_validation(rows):
            yield batch.to(self.ranks.device)

    def train(
        self,
        steps: int | None = None,
        extra: Steps | None = None,
        until: Callable[[], bool] = lambda: False,
    ) -> None:
        """Trains the model on the next batches, by default on all remaining ones.

        Args:
            steps: number of batches.
            extra: extra loss term and the parameters that it trains, such as gates and their
                penalty.
            until: condition checked before each step; training ends when it is true. It must be
                the same on every rank.

        Raises:
            TrainingDiverged: if the loss is not finite.
        """
        start = self.trained_rows
        stop = self.rows if steps is None else min(start + steps * self.batch_size, self.rows)
        progress = train(
            self.job.model,
            self.job.optimizer,
            self._numbered(start, stop, until),
            phase="pretrain",
            total=(stop - start) // self.batch_size,
            ranks=self.ranks,
            log=self._log,
            extra=extra,
        )
        self.trained_rows = start + progress.steps * self.batch_size
        self.progress.append(progress)

    def _numbered(self, start: int, stop: int, until: Callable[[], bool]) -> Iterator[Batch]:
        """Batches of these rows; each is requested after the previous step has ended."""
        for step, batch in enumerate(self._rows.read(start, stop), start // self.batch_size):
            if until():
                return
            if self._before_step is not None:
                self._before_step(step)
            yield batch
