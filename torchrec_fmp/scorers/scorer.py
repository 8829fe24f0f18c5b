"""The interface of a scorer: from the rows of pretraining to `FeatureScores`."""

from __future__ import annotations

import abc

from torchrec_fmp.scorers.pretraining import Pretraining
from torchrec_fmp.selection.feature_scores import FeatureScores


class Scorer(abc.ABC):
    """Gives every feature of the model a score."""

    @abc.abstractmethod
    def score(self, pretraining: Pretraining) -> FeatureScores:
        """Scores the features; collective, every rank gets the same.

        Rows that it trains on are not trained on again: the next phase goes on behind them.

        Args:
            pretraining: the sharded model, whose gates are all open, and the rows.
        """
