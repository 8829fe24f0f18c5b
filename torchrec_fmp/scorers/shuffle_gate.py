"""ShuffleGate: a gate that mixes each feature with its values in other examples."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Adam

from torchrec_fmp.scorers.features import features_of, scores_of
from torchrec_fmp.scorers.learning import BilevelSteps, check_learning, generator
from torchrec_fmp.scorers.pretraining import Pretraining
from torchrec_fmp.scorers.probe import Block, probed
from torchrec_fmp.scorers.scorer import Scorer
from torchrec_fmp.selection.feature_scores import FeatureScores

_TEMPERATURE = 5.0


class ShuffleGateScorer(Scorer):
    """The model reads g x + (1 - g) x', where x' is x of a random other example; the score is g.

    Huang et al. 2025, "ShuffleGate" (arXiv:2503.09315), and its code (goldenNormal/ShuffleGate,
    models/fs/shuffle_gate.py and utils/fs_trainer.py): g = sigmoid(5 theta), and theta starts at
    1. Every feature is shuffled in a separate order, and no gradient flows through the shuffled
    values. Theta learns from validation batches, one per model step; the penalty in their loss is
    `penalty` times the mean gate.

    Args:
        learning_rate: learning rate of Adam for theta.
        penalty: penalty of the mean gate, in the loss's unit.
        every: number of model steps per step of theta; 1 in the official code.

    Raises:
        ValueError: if the learning rate is not positive or `every` is below 1.
    """

    def __init__(self, learning_rate: float = 1e-2, penalty: float = 1e-2, every: int = 1) -> None:
        check_learning(learning_rate, every)
        self.learning_rate = learning_rate
        self.penalty = penalty
        self.every = every

    def score(self, pretraining: Pretraining) -> FeatureScores:
        model, ranks = pretraining.job.model, pretraining.ranks
        features = features_of(model)
        theta_F = nn.Parameter(torch.ones(len(features), device=ranks.device))
        steps = BilevelSteps(
            pretraining,
            [theta_F],
            Adam([theta_F], lr=self.learning_rate),
            self.every,
            lambda: self.penalty * (_TEMPERATURE * theta_F).sigmoid().mean(),
        )

        def mixed(block: Block) -> Tensor:
            noise = generator(pretraining.seed, steps.forwards, ranks)
            gates_K = block.of_keys((_TEMPERATURE * theta_F).sigmoid(), features)
            return block.scaled(gates_K) + shuffled(block, noise).scaled(1 - gates_K)

        with probed(model, mixed):
            pretraining.train(extra=steps)
        return scores_of(model, (_TEMPERATURE * theta_F.detach()).sigmoid())


def shuffled(block: Block, noise: torch.Generator) -> Block:
    """The block with each key's rows in a separate random order, without gradient."""
    values = block.values.detach()
    order_KR = torch.rand(
        len(block.lengths), len(values), generator=noise, device=values.device
    ).argsort(dim=1)
    parts = values.split(list(block.lengths), dim=1)
    columns = [part[order] for part, order in zip(parts, order_KR, strict=True)]
    return replace(block, values=torch.cat(columns, dim=1))
