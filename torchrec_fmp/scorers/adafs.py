"""AdaFS: a controller that weights the features of each example."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Adam
from torchrec.datasets.utils import Batch

from torchrec_fmp.embeddings.evaluation import evaluation, steps_uncounted
from torchrec_fmp.scorers.features import features_of, scores_of
from torchrec_fmp.scorers.learning import (
    JointSteps,
    check_batches,
    check_learning,
    validation_batches,
)
from torchrec_fmp.scorers.pretraining import Pretraining
from torchrec_fmp.scorers.probe import Block, probed
from torchrec_fmp.scorers.scorer import Scorer
from torchrec_fmp.selection.feature_scores import FeatureScores


class AdaFsScorer(Scorer):
    """Weights each example's features by an MLP over all features; the score is the mean weight.

    Lin et al. 2022, "AdaFS: Adaptive Feature Selection in Deep Recommender System" (KDD), the hard
    variant: the `keep` largest softmax weights of an example are scaled to a sum of 1, and the
    others become 0. The controller is ERASE's (Applied-Machine-Learning-Lab/ERASE,
    models/fs/adafs.py), batch normalization and one hidden layer, and learns jointly with the
    model, as in ERASE. The score is the mean weight over validation examples, before the smaller
    weights become 0.

    This differs from ERASE in three ways. Weights are multiplied by the number of features, so that
    embeddings keep the scale that they have in continued training. The model reads embeddings
    unnormalized, because the pruned model has no batch normalization for them. The controller reads
    each feature's sum over its columns and, in a sequence, over its positions; a forward pass
    without gradient collects these sums first.

    Args:
        keep: share of an example's features to keep.
        learning_rate: learning rate of Adam for the controller.
        hidden: size of the controller's hidden layer.
        batches: number of validation batches on each rank.

    Raises:
        ValueError: if `keep` is not in (0, 1], or another argument is not positive.
    """

    def __init__(
        self,
        keep: float = 0.5,
        learning_rate: float = 1e-2,
        hidden: int = 16,
        batches: int = 100,
    ) -> None:
        check_learning(learning_rate)
        if not 0 < keep <= 1:
            raise ValueError(f"the share of features to keep is {keep}; it must be in (0, 1]")
        if hidden < 1:
            raise ValueError(f"hidden is {hidden}; it must be at least 1")
        self.keep = keep
        self.learning_rate = learning_rate
        self.hidden = hidden
        self.batches = check_batches(batches)

    def score(self, pretraining: Pretraining) -> FeatureScores:
        model, ranks = pretraining.job.model, pretraining.ranks
        features = features_of(model)
        controller = _controller(len(features), self.hidden, pretraining.seed).to(ranks.device)
        parameters = list(controller.parameters())
        steps = JointSteps(pretraining, parameters, Adam(parameters, lr=self.learning_rate))
        count = max(1, round(self.keep * len(features)))
        controlled = _Controlled(model, controller, features, count)
        collect = model.register_forward_pre_hook(lambda _, batch: controlled.collect(*batch))
        with probed(model, controlled):
            pretraining.train(extra=steps)
            collect.remove()
            weights_F = self._mean_weights(pretraining, controlled)
        return scores_of(model, weights_F)

    def _mean_weights(self, pretraining: Pretraining, controlled: _Controlled) -> Tensor:
        """(F,) mean weights over the validation examples of all ranks."""
        controlled.controller.eval()
        ranks = pretraining.ranks
        sums = torch.zeros(len(controlled.features) + 1, dtype=torch.float64, device=ranks.device)
        for batch in validation_batches(pretraining, self.batches):
            controlled.collect(batch)
            weights_BF = controlled.logits().detach().softmax(1).double()
            sums += nn.functional.pad(weights_BF, (0, 1), value=1.0).sum(0)
        dist.all_reduce(sums, group=ranks.group)
        return sums[:-1] / sums[-1]


def hard(logits_BF: Tensor, count: int) -> Tensor:
    """(B, F) softmax weights: the `count` largest per example, scaled to a sum of 1; others 0."""
    weights_BF = logits_BF.softmax(1)
    largest = weights_BF.topk(count, dim=1)
    kept_BF = torch.zeros_like(weights_BF).scatter(1, largest.indices, largest.values)
    return kept_BF / kept_BF.sum(1, keepdim=True)


def _controller(features: int, hidden: int, seed: int) -> nn.Module:
    """A controller that is equal on every rank; the global generator is left unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.BatchNorm1d(features),
            nn.Linear(features, hidden),
            nn.ReLU(),
            nn.Linear(hidden, features),
        )


class _Controlled:
    """A change that scales the values that the model reads by the weights of the current batch."""

    def __init__(
        self, model: nn.Module, controller: nn.Module, features: Sequence[str], count: int
    ) -> None:
        self.controller = controller
        self.features = features
        self._model = model
        self._count = count
        self._sums_BF: Tensor | None = None
        self._is_collecting = False

    def __call__(self, block: Block) -> Tensor:
        if self._is_collecting:
            sums_BF = block.per_example(block.values, self.features, block.batch_size)
            self._sums_BF = sums_BF if self._sums_BF is None else self._sums_BF + sums_BF
            return block.values
        weights_BF = len(self.features) * hard(self.logits(), self._count)
        return block.scaled(block.of_keys(weights_BF, self.features))

    def logits(self) -> Tensor:
        """(B, F) logits of the last collected batch."""
        logits_BF: Tensor = self.controller(self._sums_BF)
        return logits_BF

    def collect(self, batch: Batch) -> None:
        """Sums the values that the model reads per feature; a no-op inside its own forward."""
        if self._is_collecting:
            return
        self._sums_BF, self._is_collecting = None, True
        with evaluation(self._model), steps_uncounted(self._model):
            self._model(batch)
        self._is_collecting = False
