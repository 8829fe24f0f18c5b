"""LPFS++: a learnable polarizing gate on each feature."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Adam

from torchrec_fmp.scorers.features import features_of, scores_of
from torchrec_fmp.scorers.learning import JointSteps, check_learning
from torchrec_fmp.scorers.pretraining import Pretraining
from torchrec_fmp.scorers.probe import Block, probed
from torchrec_fmp.scorers.scorer import Scorer
from torchrec_fmp.selection.feature_scores import FeatureScores

# The paper's and ERASE's constants.
_ALPHA = 10.0
_TAU = 2.0
_FIRST_EPSILON = 0.1
_EPSILON_DECAY = 0.9978
_DECAY_STEPS = 100
_THRESHOLD = 0.01


class LpfsScorer(Scorer):
    """Gates each feature by g(x) = x^2 / (x^2 + eps) + alpha eps^(1/tau) atan(x), odd in x.

    Guo et al. 2022, "LPFS: Learnable Polarizing Feature Selection for Click-Through Rate
    Prediction" (arXiv:2206.00267, LPFS++), as in ERASE (Applied-Machine-Learning-Lab/ERASE,
    models/fs/lpfs.py and utils/fs_trainer.py): x starts at 1 and learns jointly with the model;
    after each step it is soft-thresholded by 0.01 of the learning rate; eps starts at 0.1 and
    falls by 0.22% every 100 steps; the score is x. g is divided by its initial value, 3.4, so that
    the model reads the same values with the gates as after their removal.

    Args:
        learning_rate: learning rate of Adam for x.

    Raises:
        ValueError: if the learning rate is not positive.
    """

    def __init__(self, learning_rate: float = 1e-2) -> None:
        check_learning(learning_rate)
        self.learning_rate = learning_rate

    def score(self, pretraining: Pretraining) -> FeatureScores:
        model = pretraining.job.model
        features = features_of(model)
        x_F = nn.Parameter(torch.ones(len(features), device=pretraining.ranks.device))
        steps = _ThresholdedSteps(pretraining, x_F, self.learning_rate)
        first = gate(x_F.detach(), _FIRST_EPSILON)

        def gated(block: Block) -> Tensor:
            epsilon = _FIRST_EPSILON * _EPSILON_DECAY ** (steps.step // _DECAY_STEPS)
            return block.scaled(block.of_keys(gate(x_F, epsilon) / first, features))

        with probed(model, gated):
            pretraining.train(extra=steps)
        return scores_of(model, x_F.detach())


def gate(x: Tensor, epsilon: float) -> Tensor:
    """g(x), elementwise."""
    polar = x.square() / (x.square() + epsilon)
    # The arc tangent's gradient at 0 lets a closed gate open again.
    return torch.where(x > 0, polar, -polar) + _ALPHA * epsilon ** (1 / _TAU) * x.atan()


class _ThresholdedSteps(JointSteps):
    """Joint steps, each followed by the proximal step of an L1 penalty on x."""

    def __init__(self, pretraining: Pretraining, x: nn.Parameter, learning_rate: float) -> None:
        super().__init__(pretraining, [x], Adam([x], lr=learning_rate))
        self._x = x
        self._threshold = _THRESHOLD * learning_rate

    def update(self, step: int) -> None:
        super().update(step)
        with torch.no_grad():
            self._x.copy_(nn.functional.softshrink(self._x, self._threshold))
