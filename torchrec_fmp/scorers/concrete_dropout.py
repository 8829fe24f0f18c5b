"""Concrete dropout: a drop probability per feature, learned with the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Adam

from torchrec_fmp.scorers.features import features_of, scores_of
from torchrec_fmp.scorers.learning import JointSteps, check_learning, generator
from torchrec_fmp.scorers.pretraining import Pretraining
from torchrec_fmp.scorers.probe import Block, probed
from torchrec_fmp.scorers.scorer import Scorer
from torchrec_fmp.selection.feature_scores import FeatureScores

_TEMPERATURE = 0.1


class ConcreteDropoutScorer(Scorer):
    """Drops features by relaxed Bernoulli variables; the score is 1 - the drop probability p.

    Each example and feature has one variable.

    TorchEasyRec's feature selection (alibaba/TorchEasyRec, tzrec/modules/variational_dropout.py),
    after Chang, Rampasek and Goldenberg 2017, "Dropout Feature Ranking for Deep Learning Models"
    (arXiv:1712.08645): logits of p start from a standard normal distribution, the temperature is
    0.1, and the penalty is `penalty` / B times the sum over features of 1 - p, for batches of B.

    Args:
        learning_rate: learning rate of Adam for the logits.
        penalty: weight of the penalty; lambda in the official code.

    Raises:
        ValueError: if the learning rate is not positive.
    """

    def __init__(self, learning_rate: float = 1e-2, penalty: float = 0.01) -> None:
        check_learning(learning_rate)
        self.learning_rate = learning_rate
        self.penalty = penalty

    def score(self, pretraining: Pretraining) -> FeatureScores:
        model, ranks, seed = pretraining.job.model, pretraining.ranks, pretraining.seed
        features = features_of(model)
        # On CPU and independent of the rank, so that every rank starts from the same logits.
        start = torch.randn(len(features), generator=torch.Generator().manual_seed(seed))
        logits_F = nn.Parameter(start.to(ranks.device))
        weight = self.penalty / pretraining.batch_size
        steps = JointSteps(
            pretraining,
            [logits_F],
            Adam([logits_F], lr=self.learning_rate),
            lambda: weight * (-logits_F).sigmoid().sum(),
        )

        def dropped(block: Block) -> Tensor:
            shape = (block.batch_size, len(features))
            noise = generator(seed, steps.step, ranks)
            uniform_BF = torch.rand(shape, generator=noise, device=ranks.device)
            kept_BF = 1 - concrete(logits_F, uniform_BF)
            return block.scaled(block.of_keys(kept_BF, features))

        with probed(model, dropped):
            pretraining.train(extra=steps)
        return scores_of(model, (-logits_F.detach()).sigmoid())


def concrete(logits_F: Tensor, uniform_BF: Tensor) -> Tensor:
    """(B, F) in [0, 1], near 1 with probability sigmoid(logits)."""
    epsilon = torch.finfo(torch.float32).eps
    noise_BF = (uniform_BF + epsilon).log() - (1 - uniform_BF + epsilon).log()
    return ((logits_F + noise_BF) / _TEMPERATURE).sigmoid()
