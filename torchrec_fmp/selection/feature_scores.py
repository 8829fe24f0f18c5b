"""`FeatureScores`: the output of every scorer and the input of every policy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torchrec_fmp.selection.costs import TableCost


@dataclass(frozen=True)
class FeatureScores:
    """Importance of each feature; higher is better.

    Args:
        scores: feature -> importance, finite, in the scorer's unit.
        gates: feature -> test-time gate in [0, 1]; 1 if the scorer has none.
        collections: fqn of an embedding collection -> its features. A policy keeps at least one
            feature of each collection, because few models can do without a collection; an edited
            selection may empty one.
        table_costs: costs of the tables, in the unit that the policy reads; `decide` sets them.
        losses: number of best features kept -> validation losses of several batches; set for a
            policy that reads them.
        confidence: feature -> confidence in its decision, in [0, 1], if the scorer has it; see
            `StableDecision`.

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
            raise ValueError(
                "every feature needs a score and a gate; these have one of the two, not both: "
                f"{different}"
            )
        for feature, score in self.scores.items():
            if not math.isfinite(score):
                raise ValueError(f"the score of feature {feature!r} is {score}; it must be finite")
            if not 0 <= self.gates[feature] <= 1:
                raise ValueError(
                    f"the gate of feature {feature!r} is {self.gates[feature]}; it must be in "
                    "[0, 1]"
                )

    @property
    def ranked(self) -> list[str]:
        """The features from best to worst; ties in the model's order."""
        return sorted(self.scores, key=lambda name: -self.scores[name])
