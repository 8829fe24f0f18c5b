"""`FeatureScores`: what every scorer returns and every policy reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torchrec_fmp.selection.costs import TableCost


@dataclass(frozen=True)
class FeatureScores:
    """Importance of each feature, higher is better.

    Args:
        scores: feature -> importance, finite; the unit is the scorer's.
        gates: feature -> test-time gate in [0, 1]; 1 where the scorer has none.
        collections: fqn of an embedding collection -> its features. A policy keeps at least
            one feature of each, because few models can do without a collection; a selection that
            was edited may empty it.
        table_costs: what tables cost, in the unit that the policy reads; `decide` sets them.
        losses: number of best features left -> validation loss of each of some batches; set for
            the policy that reads them.
        confidence: feature -> how sure the decision on it is, in [0, 1], where the scorer says so;
            see `StableDecision`.

    Raises:
        ValueError: if scores and gates name different features, or a number is out of range.
    """

    scores: Mapping[str, float]
    gates: Mapping[str, float]
    collections: Mapping[str, Sequence[str]] = field(default_factory=dict)
    table_costs: Sequence[TableCost] = ()
    losses: Mapping[int, Sequence[float]] = field(default_factory=dict)
    confidence: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.scores.keys() != self.gates.keys():
            different = sorted(self.scores.keys() ^ self.gates.keys())
            raise ValueError(f"features with a score or a gate, but not both: {different}")
        for feature, score in self.scores.items():
            if not math.isfinite(score):
                raise ValueError(f"the score of feature {feature!r} is {score}, not finite")
            if not 0 <= self.gates[feature] <= 1:
                raise ValueError(
                    f"the gate of feature {feature!r} is {self.gates[feature]}, not in [0, 1]"
                )

    @property
    def ranked(self) -> list[str]:
        """The features from the best to the worst; ties in the model's order."""
        return sorted(self.scores, key=lambda name: -self.scores[name])
