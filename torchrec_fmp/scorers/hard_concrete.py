"""Scores from hard concrete gates trained with the model."""

from __future__ import annotations

import math
from dataclasses import replace

from torchrec_fmp.gates.attach import gate_optimizer
from torchrec_fmp.gates.penalty import L0Penalty, Penalty
from torchrec_fmp.gates.schedule import GateSchedule
from torchrec_fmp.gates.scores import gate_scores
from torchrec_fmp.scorers.pretraining import Pretraining
from torchrec_fmp.scorers.scorer import Scorer
from torchrec_fmp.scorers.stopping import StableDecision, WatchedGates, warn_of_undecided
from torchrec_fmp.selection.feature_scores import FeatureScores


class HardConcreteScorer(Scorer):
    """Trains the gates together with the model, and scores a feature by its `log_alpha`.

    Args:
        penalty: penalty that drives the gates to close; `L0Penalty()` by default.
        learning_rate: learning rate of Adam for log_alpha.
        open_fraction: fraction of the steps, at the start, in which every gate is exactly open.
        ramp_fraction: fraction of the steps, after the open ones, in which the penalty grows to its
            full strength.
        stop: rule that ends pretraining when the decision is stable; None uses all pretraining
            rows.

    Raises:
        ValueError: if the learning rate is not positive, or the fractions leave no steps.
    """

    def __init__(
        self,
        penalty: Penalty | None = None,
        learning_rate: float = 0.1,
        open_fraction: float = 0.5,
        ramp_fraction: float = 0.1,
        stop: StableDecision | None = None,
    ) -> None:
        if not (learning_rate > 0 and math.isfinite(learning_rate)):
            raise ValueError(f"the gates' learning_rate is {learning_rate}; it must be positive")
        if not (open_fraction >= 0 <= ramp_fraction) or open_fraction + ramp_fraction >= 1:
            raise ValueError(
                f"open_fraction {open_fraction} and ramp_fraction {ramp_fraction} must not be "
                "negative, and must leave part of the phase for the full penalty"
            )
        self.penalty = L0Penalty() if penalty is None else penalty
        self.learning_rate = learning_rate
        self.open_fraction = open_fraction
        self.ramp_fraction = ramp_fraction
        self.stop = stop

    def score(self, pretraining: Pretraining) -> FeatureScores:
        model, steps = pretraining.job.model, pretraining.steps
        open_steps, ramp_steps = int(self.open_fraction * steps), int(self.ramp_fraction * steps)
        optimizer = gate_optimizer(model, self.learning_rate)
        schedule = GateSchedule(
            gates=pretraining.gates,
            optimizer=optimizer,
            penalty=self.penalty.priced(pretraining.costs, pretraining.share),
            steps=steps,
            open_steps=open_steps,
            ramp_steps=ramp_steps,
        )
        if self.stop is None:
            pretraining.train(extra=schedule)
            return gate_scores(model)
        floor = open_steps + ramp_steps
        watched = WatchedGates(self.stop, schedule, pretraining, optimizer, floor)
        pretraining.train(extra=watched, until=lambda: watched.is_stable)
        scores = gate_scores(model)
        confidence = watched.confidence(scores)
        if not watched.is_stable:
            warn_of_undecided(confidence, pretraining.ranks.speaks)
        return replace(scores, confidence=confidence)
