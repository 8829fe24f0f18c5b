"""Drop what has closed: the size is found, not asked for."""

from __future__ import annotations

from torchrec_fmp.policies.policy import Policy, drop, keep
from torchrec_fmp.policies.selection import Selection
from torchrec_fmp.scores.feature_scores import FeatureScores


class ClosedGates(Policy):
    """Drops the features whose test-time gate is exactly 0.

    That is log_alpha <= log(-gamma / zeta), -2.398 for the paper's values. Dropping them changes
    nothing that the gated model computes in evaluation.
    """

    def select(self, scores: FeatureScores) -> Selection:
        features = {}
        for name, gate in scores.gates.items():
            if gate == 0:
                features[name] = drop(scores, name, "gate closed")
            else:
                features[name] = keep(scores, name, "gate open")
        return Selection(features)
