"""The interface of a policy, and `decide`, which applies one."""

from __future__ import annotations

import abc

from torchrec_fmp.policies.selection import FeatureDecision, Selection
from torchrec_fmp.scores.feature_scores import FeatureScores


class Policy(abc.ABC):
    """Decides which features stay."""

    @abc.abstractmethod
    def select(self, scores: FeatureScores) -> Selection:
        """A decision for every feature of `scores`, in their order."""


def decide(scores: FeatureScores, policy: Policy) -> Selection:
    """Applies the policy, and keeps the best feature of a collection that would become empty."""
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
        )
    return Selection(features)


def keep(scores: FeatureScores, feature: str, reason: str) -> FeatureDecision:
    """Keeps a feature at its gate, or fully open where its gate is 0."""
    gate = scores.gates[feature]
    return FeatureDecision(scores.scores[feature], gate or 1.0, kept=True, reason=reason)


def drop(scores: FeatureScores, feature: str, reason: str) -> FeatureDecision:
    """Drops a feature."""
    return FeatureDecision(scores.scores[feature], 0.0, kept=False, reason=reason)
