"""SHARK's first-order Taylor score: the loss change when a feature becomes its mean."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from torchrec_fmp.distributed.ranks import Ranks
from torchrec_fmp.scorers.features import features_of, scores_of
from torchrec_fmp.scorers.learning import check_batches, validation_batches
from torchrec_fmp.scorers.pretraining import Pretraining
from torchrec_fmp.scorers.probe import Block, observed, probed
from torchrec_fmp.scorers.scorer import Scorer
from torchrec_fmp.selection.feature_scores import FeatureScores


class TaylorScorer(Scorer):
    """Mean over examples of |dL/de . (E[e] - e)|, where e is all that the model reads of a feature.

    SHARK (Zhang et al. 2023, arXiv:2308.09395, section 3.1, F-permutation), as in ERASE
    (Applied-Machine-Learning-Lab/ERASE, models/fs/shark.py): L is the loss of one example of the
    trained model, e is the example's embedding, and E[e] is the mean over the validation rows. The
    products of an example are summed over the feature's tables and, in a sequence, over its
    positions.

    Args:
        batches: number of validation batches on each rank, read twice; ERASE uses the whole split.

    Raises:
        ValueError: if batches is below 1.
    """

    def __init__(self, batches: int = 100) -> None:
        self.batches = check_batches(batches)

    def score(self, pretraining: Pretraining) -> FeatureScores:
        pretraining.train()
        model, ranks = pretraining.job.model, pretraining.ranks
        features = features_of(model)
        recorder = _Recorder()
        total = torch.zeros(len(features), dtype=torch.float64, device=ranks.device)
        rows = torch.zeros((), dtype=torch.float64, device=ranks.device)
        with observed(model), probed(model, recorder):
            means = self._means(pretraining, recorder)
            for batch in validation_batches(pretraining, self.batches):
                loss, _ = model(batch)
                blocks, values = recorder.take()
                gradients = torch.autograd.grad(loss, values)
                size = len(batch.labels)
                products = torch.zeros(size, len(features), device=ranks.device)
                for block, value, gradient, mean in zip(
                    blocks, values, gradients, means, strict=True
                ):
                    change = gradient * (mean - value.detach())
                    products += block.per_example(change.float(), features, size)
                # The loss is the mean over examples; `size` restores each example's gradient.
                total += (size * products).abs().sum(0, dtype=torch.float64)
                rows += size
        return scores_of(model, _sum(total, ranks) / _sum(rows, ranks))

    def _means(self, pretraining: Pretraining, recorder: _Recorder) -> list[Tensor]:
        """(W,) mean of each block over the rows of all ranks, in forward order."""
        sums: list[Tensor] = []
        rows: list[Tensor] = []
        with torch.no_grad():
            for batch in validation_batches(pretraining, self.batches):
                pretraining.job.model(batch)
                _, values = recorder.take()
                if not sums:
                    sums = [value.new_zeros(value.shape[1]) for value in values]
                    rows = [value.new_zeros(()) for value in values]
                for position, value in enumerate(values):
                    sums[position] += value.sum(0)
                    rows[position] += len(value)
        ranks = pretraining.ranks
        return [
            _sum(total, ranks) / _sum(count, ranks).clamp(min=1)
            for total, count in zip(sums, rows, strict=True)
        ]


class _Recorder:
    """A change that leaves values unchanged and records the values that the model reads."""

    def __init__(self) -> None:
        self._blocks: list[Block] = []
        self._values: list[Tensor] = []

    def __call__(self, block: Block) -> Tensor:
        values = block.values.detach().requires_grad_()
        self._blocks.append(block)
        self._values.append(values)
        return values

    def take(self) -> tuple[list[Block], list[Tensor]]:
        """The blocks of the last forward, and the leaf tensors that the model read."""
        taken = self._blocks, self._values
        self._blocks, self._values = [], []
        return taken


def _sum(tensor: Tensor, ranks: Ranks) -> Tensor:
    dist.all_reduce(tensor, group=ranks.group)
    return tensor
