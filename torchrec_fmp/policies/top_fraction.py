"""Keep a share of the features, the best ones."""

from __future__ import annotations

from torchrec_fmp.policies.policy import Policy, drop, keep
from torchrec_fmp.policies.selection import Selection
from torchrec_fmp.scores.feature_scores import FeatureScores


class TopFraction(Policy):
    """Keeps round(fraction * features) features, at least one, by score; ties by order.

    Args:
        fraction: share of all features to keep, in (0, 1].

    Raises:
        ValueError: if the fraction is out of range.
    """

    def __init__(self, fraction: float) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f"the fraction of features to keep is {fraction}, not in (0, 1]")
        self.fraction = fraction

    def select(self, scores: FeatureScores) -> Selection:
        count = max(1, round(self.fraction * len(scores.scores)))
        ranked = scores.ranked
        best = set(ranked[:count])
        features = {}
        for rank, name in enumerate(ranked, start=1):
            reason = f"rank {rank} of {len(ranked)}, {count} stay"
            decision = keep if name in best else drop
            features[name] = decision(scores, name, reason)
        return Selection({name: features[name] for name in scores.scores})
