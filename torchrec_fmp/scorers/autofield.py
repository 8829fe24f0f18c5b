"""AutoField: a keep-or-drop choice for each field, learned on validation batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Adam

from torchrec_fmp.scorers.features import features_of, scores_of
from torchrec_fmp.scorers.learning import BilevelSteps, check_learning, gumbel
from torchrec_fmp.scorers.pretraining import Pretraining
from torchrec_fmp.scorers.probe import Block, probed
from torchrec_fmp.scorers.scorer import Scorer
from torchrec_fmp.selection.feature_scores import FeatureScores

_LAST_TEMPERATURE = 0.01


class AutoFieldScorer(Scorer):
    """Scales each field by the Gumbel-softmax of two logits, drop and keep.

    Wang et al. 2022, "AutoField: Automating Feature Selection in Deep Recommender Systems" (WWW),
    as in ERASE (Applied-Machine-Learning-Lab/ERASE, models/fs/autofield.py). One sample is drawn
    per step. The logits start at 0.5 and learn from validation batches by first-order DARTS; the
    score is the keep logit. The temperature falls linearly from 1 to 0.01 over pretraining; in
    ERASE it falls by 5e-5 per step, which fits ERASE's number of steps.

    Args:
        learning_rate: learning rate of Adam for the logits.
        every: number of model steps per step of the logits; 10 in ERASE.

    Raises:
        ValueError: if the learning rate is not positive or `every` is below 1.
    """

    def __init__(self, learning_rate: float = 1e-2, every: int = 10) -> None:
        check_learning(learning_rate, every)
        self.learning_rate = learning_rate
        self.every = every

    def score(self, pretraining: Pretraining) -> FeatureScores:
        model, ranks = pretraining.job.model, pretraining.ranks
        features = features_of(model)
        logits_F2 = nn.Parameter(torch.full((len(features), 2), 0.5, device=ranks.device))
        steps = BilevelSteps(
            pretraining, [logits_F2], Adam([logits_F2], lr=self.learning_rate), self.every
        )
        forwards = pretraining.steps * (1 + 1 / self.every)

        def selected(block: Block) -> Tensor:
            noise_F2 = gumbel(logits_F2, pretraining.seed, steps.forwards, ranks)
            progress = min(1.0, steps.forwards / forwards)
            temperature = 1 + progress * (_LAST_TEMPERATURE - 1)
            gates_F = torch.softmax((logits_F2 + noise_F2) / temperature, dim=-1)[:, 1]
            return block.scaled(block.of_keys(gates_F, features))

        with probed(model, selected):
            pretraining.train(extra=steps)
        return scores_of(model, logits_F2[:, 1].detach())
