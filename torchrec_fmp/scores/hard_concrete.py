"""Scores from hard concrete gates that are trained with the model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torchrec_fmp.gates.attach import gate_optimizer
from torchrec_fmp.gates.penalty import L0Penalty, Penalty
from torchrec_fmp.scores.feature_scores import FeatureScores
from torchrec_fmp.scores.gate_scores import gate_scores
from torchrec_fmp.scores.scorer import Scorer
from torchrec_fmp.train import GateSchedule

if TYPE_CHECKING:
    from torchrec_fmp.pretraining import Pretraining


class HardConcreteScorer(Scorer):
    """Trains the model's gates together with it, and scores a feature by its `log_alpha`.

    Args:
        penalty: what drives the gates to close; `L0Penalty()` by default.
        learning_rate: of Adam, for log_alpha.
        open_fraction: of the steps, at their start, in which every gate is exactly open.
        ramp_fraction: of the steps, after these, in which the penalty grows to its full strength.

    Raises:
        ValueError: if the learning rate is not positive, or the fractions leave no steps.
    """

    def __init__(
        self,
        penalty: Penalty | None = None,
        learning_rate: float = 0.1,
        open_fraction: float = 0.4,
        ramp_fraction: float = 0.1,
    ) -> None:
        if not (learning_rate > 0 and math.isfinite(learning_rate)):
            raise ValueError(f"the gates' learning_rate is {learning_rate}, it must be positive")
        if not (open_fraction >= 0 <= ramp_fraction) or open_fraction + ramp_fraction >= 1:
            raise ValueError(
                f"open_fraction {open_fraction} and ramp_fraction {ramp_fraction} must not be "
                "negative and leave a part of the phase for the full penalty"
            )
        self.penalty = L0Penalty() if penalty is None else penalty
        self.learning_rate = learning_rate
        self.open_fraction = open_fraction
        self.ramp_fraction = ramp_fraction

    def score(self, pretraining: Pretraining) -> FeatureScores:
        model, steps = pretraining.job.model, pretraining.steps
        schedule = GateSchedule(
            gates=pretraining.gates,
            optimizer=gate_optimizer(model, self.learning_rate),
            penalty=self.penalty.priced(pretraining.costs, pretraining.share),
            steps=steps,
            open_steps=int(self.open_fraction * steps),
            ramp_steps=int(self.ramp_fraction * steps),
        )
        pretraining.train(extra=schedule)
        return gate_scores(model)
