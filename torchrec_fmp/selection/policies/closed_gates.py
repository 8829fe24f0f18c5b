"""Drop the features whose gates have closed: the size is found, not given."""

from __future__ import annotations

from torchrec_fmp.selection.feature_scores import FeatureScores
from torchrec_fmp.selection.policies.policy import Policy, drop, keep
from torchrec_fmp.selection.selection import Selection


class ClosedGates(Policy):
    """Drops the features whose test-time gate is at most a threshold.

    A threshold of 0.5 means log_alpha <= 0: the penalty's price exceeds the feature's worth, though
    there was no time to close the gate completely (docs/method.md). A threshold of 0 means
    log_alpha <= log(-gamma / zeta), -2.398 for the paper's values; dropping then changes nothing
    that the gated model computes in evaluation.

    Args:
        threshold: largest gate of a dropped feature, in [0, 1).

    Raises:
        ValueError: if the threshold is out of range.
    """

    def __init__(self, threshold: float = 0.5) -> None:
        if not 0 <= threshold < 1:
            raise ValueError(f"the threshold of closed gates is {threshold}; it must be in [0, 1)")
        self.threshold = threshold

    def select(self, scores: FeatureScores) -> Selection:
        features = {}
        for name, gate in scores.gates.items():
            if gate <= self.threshold:
                features[name] = drop(scores, name, f"gate closed to {gate:.3g}")
            else:
                features[name] = keep(scores, name, f"gate open at {gate:.3g}")
        return Selection(features)
