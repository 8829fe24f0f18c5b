"""Features in random order: the baseline for every scorer."""

from __future__ import annotations

import numpy as np
import torch

from torchrec_fmp.scorers.features import features_of, scores_of
from torchrec_fmp.scorers.pretraining import Pretraining
from torchrec_fmp.scorers.scorer import Scorer
from torchrec_fmp.selection.feature_scores import FeatureScores


class RandomScorer(Scorer):
    """A random order of the features, determined by the run's seed; the last feature has score 0.

    The open model is trained first, as with other scorers, so that scorers compare at equal
    samples.
    """

    def score(self, pretraining: Pretraining) -> FeatureScores:
        pretraining.train()
        model = pretraining.job.model
        random = np.random.default_rng(pretraining.seed)
        order = random.permutation(len(features_of(model)))
        return scores_of(model, torch.from_numpy(order).double())
