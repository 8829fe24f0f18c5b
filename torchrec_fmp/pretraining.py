"""`Pretraining`: the model and the rows that a scorer works with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Literal

from torchrec.datasets.utils import Batch

from torchrec_fmp.gates.attach import feature_gates
from torchrec_fmp.gates.feature_gates import FeatureGates
from torchrec_fmp.job import Job
from torchrec_fmp.metrics_log import MetricsLog
from torchrec_fmp.planning.costs import Unit, costs
from torchrec_fmp.planning.planner import run_topology
from torchrec_fmp.policies.closed_gates import ClosedGates
from torchrec_fmp.policies.policy import decide as decide_by
from torchrec_fmp.policies.selection import Selection
from torchrec_fmp.ranks import Ranks
from torchrec_fmp.scores.feature_scores import FeatureScores
from torchrec_fmp.train import Progress, Steps, train


class Pretraining:
    """A gated model before its features are selected, and the rows to select them by.

    With several prunes, there is one for each, on its part of the rows.

    Args:
        job: the sharded model with gates, which are opened, and its optimizer.
        ranks: the group.
        read: (start, stop) -> batches of this rank's rows of pretraining.
        read_validation: rows of all ranks -> batches of this rank's share of as many others, or of
            all others where there are fewer.
        rows: of this rank that are for pretraining.
        batch_size: rows a step on each rank, and of the batches that are read.
        seed: of the run.
        log: gets the training's losses.
        before_step: called with the number of each step of training, from 0, before it.
        share: what the last prune leaves, as a share of all -> what the coming one leaves.
        prices: `costs` by unit, of the first model; those that are missing are put in.
        decide: what the run's policy would decide now.
    """

    def __init__(
        self,
        job: Job,
        ranks: Ranks,
        read: Callable[[int, int], Iterable[Batch]],
        read_validation: Callable[[int], Iterable[Batch]],
        rows: int,
        batch_size: int,
        seed: int,
        log: MetricsLog,
        before_step: Callable[[int], None] | None = None,
        share: Callable[[float], float] = float,
        prices: dict[str, Mapping[str, float]] | None = None,
        decide: Callable[[FeatureScores], Selection] | None = None,
    ) -> None:
        self.job = job
        self.ranks = ranks
        self.batch_size = batch_size
        self.rows = rows
        self.seed = seed
        self._read, self._read_validation = read, read_validation
        self._log = log
        self._before_step = before_step
        self.share = share
        self._prices = {} if prices is None else prices
        self.decide = decide or partial(decide_by, policy=ClosedGates())
        self.trained_rows = 0
        self.progress: list[Progress] = []
        for module in self.gates:
            module.set_open(True)

    @property
    def gates(self) -> list[FeatureGates]:
        """All gates of the model, one module for each collection and dense input."""
        return [module for _, module in feature_gates(self.job.model)]

    @property
    def steps(self) -> int:
        """Number of batches in the rows of pretraining."""
        return self.rows // self.batch_size

    def costs(self, unit: Unit | Literal["features"]) -> Mapping[str, float]:
        """Feature -> what keeping it costs in the first model, by its plan.

        Features that are gone are among them; see `torchrec_fmp.costs`. In `features`, each is 1.
        """
        if unit not in self._prices:
            self._prices[unit] = self._costs(unit)
        return self._prices[unit]

    def _costs(self, unit: Unit | Literal["features"]) -> dict[str, float]:
        if unit == "features":
            return {name: 1.0 for gates in self.gates for name in gates.features}
        topology = run_topology(self.ranks.device.type)
        return costs(self.job.model, topology, unit, batch_size=self.batch_size)

    def batches(self, steps: int | None = None) -> Iterator[Batch]:
        """The first batches of pretraining, all by default, on the device; trains nothing."""
        stop = self.batch_size * (self.steps if steps is None else steps)
        for batch in self._read(0, stop):
            yield batch.to(self.ranks.device)

    def validation_batches(self, rows: int) -> Iterator[Batch]:
        """Batches, on the device, of about `rows` rows of all ranks that pretraining never reads.

        They are of those of the next phase, which trains on them later.
        """
        for batch in self._read_validation(rows):
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
        for step, batch in enumerate(self._read(start, stop), start // self.batch_size):
            if until():
                return
            if self._before_step is not None:
                self._before_step(step)
            yield batch
