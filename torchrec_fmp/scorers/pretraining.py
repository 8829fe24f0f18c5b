"""`Pretraining`: the model and the rows that a scorer works with."""

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
    """The rows to select features by.

    Args:
        read: (start, stop) -> batches of this rank's rows of pretraining.
        read_validation: rows of all ranks -> batches of this rank's share of as many others, or of
            all others where there are fewer.
        count: number of this rank's rows that are for pretraining.
        batch_size: rows a step on each rank, and of the batches that are read.
    """

    read: Callable[[int, int], Iterable[Batch]]
    read_validation: Callable[[int], Iterable[Batch]]
    count: int
    batch_size: int


@dataclass(frozen=True)
class PruneContext:
    """What the coming prune is to leave, and how it will be decided.

    Args:
        share: what the last prune leaves, as a share of all -> what the coming one leaves.
        decide: scores -> what the run's policy would decide now.
        costs: unit -> feature -> cost, of the first model; those that are missing are put in.
    """

    share: Callable[[float], float] = float
    decide: Callable[[FeatureScores], Selection] = partial(decide_by, policy=ClosedGates())
    costs: dict[str, Mapping[str, float]] = field(default_factory=dict)


class Pretraining:
    """A gated model before its features are selected, and the rows to select them by.

    With several prunes, there is one for each, on its part of the rows.

    Args:
        job: the sharded model with gates, which are opened, and its optimizer.
        ranks: the group.
        rows: of pretraining, and of validation.
        seed: of the run.
        log: gets the training's losses.
        prune: the prune that follows.
        before_step: called with the number of each step of training, from 0, before it.
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
        """What the last prune leaves, as a share of all -> what the coming one leaves."""
        return self._prune.share

    @property
    def decide(self) -> Callable[[FeatureScores], Selection]:
        """Scores -> what the run's policy would decide now."""
        return self._prune.decide

    @property
    def gates(self) -> list[FeatureGates]:
        """All gates of the model, one module for each collection and dense input."""
        return [module for _, module in feature_gates(self.job.model)]

    @property
    def steps(self) -> int:
        """Number of batches in the rows of pretraining."""
        return self.rows // self.batch_size

    def costs(self, unit: BudgetUnit) -> Mapping[str, float]:
        """Feature -> what keeping it costs in the first model, by its plan.

        Features that are gone are among them; see `torchrec_fmp.costs`. In `features`, each is 1.
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
        """The first batches of pretraining, all by default, on the device; trains nothing."""
        stop = self.batch_size * (self.steps if steps is None else steps)
        for batch in self._rows.read(0, stop):
            yield batch.to(self.ranks.device)

    def validation_batches(self, rows: int) -> Iterator[Batch]:
        """Batches, on the device, of about `rows` rows of all ranks that pretraining never reads.

        They are of those of the next phase, which trains on them later.
        """
        for batch in self._rows.read_validation(rows):
            yield batch.to(self.ranks.device)

    def train(
        self,
        steps: int | None = None,
        extra: Steps | None = None,
        until: Callable[[], bool] = lambda: False,
    ) -> None:
        """Trains the model on the next batches, by default on all that are left.

        Args:
            steps: number of batches.
            extra: a term of the loss and what it trains, such as gates and their penalty.
            until: asked before each step, the same on every rank: whether to end here.

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
        """The batches of these rows; each is asked for when the step before it has ended."""
        for step, batch in enumerate(self._rows.read(start, stop), start // self.batch_size):
            if until():
                return
            if self._before_step is not None:
                self._before_step(step)
            yield batch
