"""Keep a share of the features: the best ones."""

from __future__ import annotations

from torchrec_fmp.selection.feature_scores import FeatureScores
from torchrec_fmp.selection.policies.policy import Policy, keep_best
from torchrec_fmp.selection.selection import Selection


class TopFraction(Policy):
    """Keeps round(fraction * features) features, at least one, by score; ties by order.

    Args:
        fraction: share of all features to keep, in (0, 1].

    Raises:
        ValueError: if the fraction is out of range.
    """

    def __init__(self, fraction: float) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(
                f"the fraction of features to keep is {fraction}; it must be in (0, 1]"
            )
        self.fraction = fraction

    def select(self, scores: FeatureScores) -> Selection:
        count = max(1, round(self.fraction * len(scores.scores)))
        return keep_best(scores, count, f"{count} stay")
