"""SFS: sensitivity of a trained model's loss to a mask on each feature."""

from __future__ import annotations

import torch
from torch import Tensor

from torchrec_fmp.scorers.features import features_of, scores_of
from torchrec_fmp.scorers.learning import average, check_batches, validation_batches
from torchrec_fmp.scorers.pretraining import Pretraining
from torchrec_fmp.scorers.probe import Block, observed, probed
from torchrec_fmp.scorers.scorer import Scorer
from torchrec_fmp.selection.feature_scores import FeatureScores


class SfsScorer(Scorer):
    """Mean |dL/dm_f| at m = 1, where m_f multiplies all values that the model reads of feature f.

    Wang et al. 2023, "Single-shot Feature Selection for Multi-task Recommendations" (SIGIR), as in
    ERASE (arXiv:2403.12660; Applied-Machine-Learning-Lab/ERASE, models/fs/sfs.py): the open model
    is trained first. Then its weights are fixed, and the absolute gradient of a batch's mean loss
    is averaged over validation batches. ERASE scales the result to a sum of 1, which does not
    change the order.

    Args:
        batches: number of batches to average over, on each rank; 100 as in ERASE.

    Raises:
        ValueError: if batches is below 1.
    """

    def __init__(self, batches: int = 100) -> None:
        self.batches = check_batches(batches)

    def score(self, pretraining: Pretraining) -> FeatureScores:
        pretraining.train()
        model, ranks = pretraining.job.model, pretraining.ranks
        features = features_of(model)
        mask = torch.ones(len(features), device=ranks.device, requires_grad=True)

        def masked(block: Block) -> Tensor:
            return block.scaled(block.of_keys(mask, features))

        gradients = []
        with observed(model), probed(model, masked):
            for batch in validation_batches(pretraining, self.batches):
                loss, _ = model(batch)
                (gradient,) = torch.autograd.grad(loss, mask)
                # The gradient of the global batch's loss, as on one rank.
                gradients.append(average(gradient, ranks).abs())
        return scores_of(model, torch.stack(gradients).mean(0))
