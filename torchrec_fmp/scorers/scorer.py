"""The scorer interface: from pretraining rows to `FeatureScores`."""

from __future__ import annotations

import abc

from torchrec_fmp.scorers.pretraining import Pretraining
from torchrec_fmp.selection.feature_scores import FeatureScores


class Scorer(abc.ABC):
    """Assigns a score to every feature of the model."""

    @abc.abstractmethod
    def score(self, pretraining: Pretraining) -> FeatureScores:
        """Scores the features. Collective; the result is the same on every rank.

        The scorer's training rows are not trained on again: the next phase continues after them.

        Args:
            pretraining: sharded model with all gates open, and the rows.
        """
