"""The validation loss of the model with only its best features, by the number of features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from torchrec_fmp.embeddings.evaluation import evaluation, steps_uncounted
from torchrec_fmp.scorers.features import features_of
from torchrec_fmp.scorers.learning import average, validation_batches
from torchrec_fmp.scorers.pretraining import Pretraining
from torchrec_fmp.scorers.probe import Block, probed
from torchrec_fmp.selection.feature_scores import FeatureScores
from torchrec_fmp.selection.policies.best_size import BestSize, smallest_size
from torchrec_fmp.selection.policies.policy import Policy

_COARSE_SIZES = 12


def with_losses(scores: FeatureScores, policy: Policy, pretraining: Pretraining) -> FeatureScores:
    """Adds the validation losses that `BestSize` reads; leaves scores unchanged for other policies.

    Tries about a dozen sizes from 1 to all features, then every size between the policy's choice
    and the next smaller size tried. Collective.

    Raises:
        ValueError: if there are no rows after pretraining.
    """
    if not isinstance(policy, BestSize):
        return scores
    ranked = scores.ranked
    steps = _COARSE_SIZES - 1
    coarse = sorted({1 + round(i * (len(ranked) - 1) / steps) for i in range(_COARSE_SIZES)})
    losses = _losses(pretraining, ranked, coarse, policy.batches)
    chosen = smallest_size(losses, policy.standard_errors)
    below = max((size for size in coarse if size < chosen), default=0)
    losses |= _losses(pretraining, ranked, range(below + 1, chosen), policy.batches)
    return replace(scores, losses=losses)


def _losses(
    pretraining: Pretraining, ranked: Sequence[str], sizes: Sequence[int], batches: int
) -> dict[int, list[float]]:
    """Size -> the loss of each validation batch, over all ranks, with the best `size` features.

    The other features are replaced by their mean over the batch. This mean keeps supplying a
    constant that training soon makes up for after the prune.
    """
    if not sizes:
        return {}
    model, ranks = pretraining.job.model, pretraining.ranks
    features = features_of(model)
    positions = {feature: index for index, feature in enumerate(features)}
    masks = torch.zeros(len(sizes), len(features), device=ranks.device)
    for row, size in zip(masks, sizes, strict=True):
        row[[positions[feature] for feature in ranked[:size]]] = 1
    mask = torch.ones(len(features), device=ranks.device)

    def kept(block: Block) -> Tensor:
        means = block.values.mean(0).expand_as(block.values)
        gates = block.of_keys(mask, features)
        return block.scaled(gates) + replace(block, values=means).scaled(1 - gates)

    rows = []
    with evaluation(model), steps_uncounted(model), probed(model, kept):
        for batch in validation_batches(pretraining, batches):
            losses = []
            for left in masks:
                mask.copy_(left)
                loss, _ = model(batch)
                losses.append(loss)
            rows.append(average(torch.stack(losses).double(), ranks))
    return dict(zip(sizes, torch.stack(rows, dim=1).tolist(), strict=True))
