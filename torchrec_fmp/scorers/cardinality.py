"""Features by the size of their tables: what a ranking that reads no data is worth."""

from __future__ import annotations

import torch

from torchrec_fmp.scorers.features import features_of, scores_of
from torchrec_fmp.scorers.pretraining import Pretraining
from torchrec_fmp.scorers.scorer import Scorer
from torchrec_fmp.selection.feature_scores import FeatureScores


class CardinalityScorer(Scorer):
    """The number of ids of a sparse feature; 1 for a dense column.

    Large tables are kept first: they hold most of the model's parameters, and features of many
    values can tell more examples apart. It is a floor, of no paper: a scorer whose selection is
    no better has only found out which features are large, and this one saves no memory.

    The open model is trained first, as other scorers do, so that they compare at equal samples.
    """

    def score(self, pretraining: Pretraining) -> FeatureScores:
        pretraining.train()
        model = pretraining.job.model
        sizes = {column.name: column.num_embeddings for column in pretraining.job.schema.sparse}
        values = [float(sizes.get(feature, 1)) for feature in features_of(model)]
        return scores_of(model, torch.tensor(values, dtype=torch.float64))
