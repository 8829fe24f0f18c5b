"""The interface of a policy, and `decide`, which applies one."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import replace

from torchrec_fmp.selection.costs import TableCost, Unit
from torchrec_fmp.selection.feature_scores import FeatureScores
from torchrec_fmp.selection.selection import FeatureDecision, Selection


class Policy(abc.ABC):
    """Decides which features are kept.

    A policy that reads `scores.table_costs` names their unit in `cost_unit`.
    """

    cost_unit: Unit | None = None

    @abc.abstractmethod
    def select(self, scores: FeatureScores) -> Selection:
        """A decision for every feature of `scores`, in their order."""


def decide(
    scores: FeatureScores, policy: Policy, costs: Sequence[TableCost] | None = None
) -> Selection:
    """Applies the policy, and keeps the best feature of a collection that would become empty.

    Args:
        scores: scores of all features.
        policy: policy to apply.
        costs: costs in the policy's `cost_unit`, from `table_costs`; by default those in `scores`.
    """
    if costs is not None:
        scores = replace(scores, table_costs=tuple(costs))
    features = dict(policy.select(scores).features)
    for fqn, names in scores.collections.items():
        if any(features[name].kept for name in names):
            continue
        best = max(names, key=lambda name: scores.scores[name])
        features[best] = FeatureDecision(
            score=scores.scores[best],
            gate=1.0,
            kept=True,
            reason=f"best of {fqn}, which would be empty; opened from {scores.gates[best]:.3g}",
            confidence=scores.confidence.get(best),
        )
    return Selection(features)


def keep_best(scores: FeatureScores, count: int, why: str) -> Selection:
    """Keeps the `count` best features by score, ties by order; each reason ends with `why`."""
    ranked = scores.ranked
    ranks = {name: rank for rank, name in enumerate(ranked, start=1)}
    return Selection(
        {
            name: (keep if ranks[name] <= count else drop)(
                scores, name, f"rank {ranks[name]} of {len(ranked)}, {why}"
            )
            for name in scores.scores
        }
    )


def keep(scores: FeatureScores, feature: str, reason: str) -> FeatureDecision:
    """Keeps a feature at its gate, or fully open if its gate is 0."""
    gate = scores.gates[feature] or 1.0
    confidence = scores.confidence.get(feature)
    return FeatureDecision(scores.scores[feature], gate, True, reason, confidence)


def drop(scores: FeatureScores, feature: str, reason: str) -> FeatureDecision:
    """Drops a feature."""
    confidence = scores.confidence.get(feature)
    return FeatureDecision(scores.scores[feature], 0.0, False, reason, confidence)
