"""Features ranked by table size: the baseline of a ranking that reads no data."""

from __future__ import annotations

import torch

from torchrec_fmp.scorers.features import features_of, scores_of
from torchrec_fmp.scorers.pretraining import Pretraining
from torchrec_fmp.scorers.scorer import Scorer
from torchrec_fmp.selection.feature_scores import FeatureScores


class CardinalityScorer(Scorer):
    """The number of ids of a sparse feature; 1 for a dense column.

    Large tables are kept first: they hold most of the model's parameters, and features with many
    values can distinguish more examples. This is a baseline from no paper: a scorer with no better
    selection has only found the large features, and this scorer saves no memory.

    The open model is trained first, as with other scorers, so that scorers compare at equal
    samples.
    """

    def score(self, pretraining: Pretraining) -> FeatureScores:
        pretraining.train()
        model = pretraining.job.model
        sizes = {column.name: column.num_embeddings for column in pretraining.job.schema.sparse}
        values = [float(sizes.get(feature, 1)) for feature in features_of(model)]
        return scores_of(model, torch.tensor(values, dtype=torch.float64))
