"""Permutation importance: how much shuffling a feature increases a trained model's loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_fmp.embeddings.evaluation import evaluation, steps_uncounted
from torchrec_fmp.scorers.features import features_of, scores_of
from torchrec_fmp.scorers.learning import average, check_batches, generator, validation_batches
from torchrec_fmp.scorers.pretraining import Pretraining
from torchrec_fmp.scorers.scorer import Scorer
from torchrec_fmp.selection.feature_scores import FeatureScores


class PermutationScorer(Scorer):
    """Increase of the validation loss when a feature is shuffled among the examples of a batch.

    Breiman 2001, "Random forests", section 10; the difference form of model reliance in Fisher,
    Rudin and Dominici 2019 (arXiv:1801.01489, section 3). Whole bags are permuted, so that the
    feature keeps its distribution. It takes one forward pass per batch and feature.

    Args:
        batches: number of validation batches on each rank.

    Raises:
        ValueError: if batches is below 1.
    """

    def __init__(self, batches: int = 20) -> None:
        self.batches = check_batches(batches)

    def score(self, pretraining: Pretraining) -> FeatureScores:
        pretraining.train()
        model, ranks = pretraining.job.model, pretraining.ranks
        features, columns = features_of(model), pretraining.job.schema.dense
        increases = []
        with evaluation(model), steps_uncounted(model):
            for step, batch in enumerate(validation_batches(pretraining, self.batches)):
                noise = generator(pretraining.seed, step, ranks)
                loss, _ = model(batch)
                losses = []
                for feature in features:
                    size, device = len(batch.labels), ranks.device
                    order = torch.randperm(size, generator=noise, device=device)
                    losses.append(model(shuffled(batch, feature, columns, order))[0])
                increases.append(torch.stack(losses) - loss)
        return scores_of(model, average(torch.stack(increases).mean(0), ranks))


def shuffled(batch: Batch, feature: str, columns: tuple[str, ...], order: Tensor) -> Batch:
    """The batch with one feature's values in another order.

    Args:
        batch: batch of B examples; not modified.
        feature: key of the batch's sparse features, or a dense column.
        columns: names of the dense columns.
        order: (B,) int64, source example of each example's values.
    """
    if feature not in columns:
        ids = _shuffled_ids(batch.sparse_features, feature, order)
        return Batch(batch.dense_features, ids, batch.labels)
    dense = batch.dense_features.clone()
    column = columns.index(feature)
    dense[:, column] = batch.dense_features[order, column]
    return Batch(dense, batch.sparse_features, batch.labels)


def _shuffled_ids(ids: KeyedJaggedTensor, feature: str, order: Tensor) -> KeyedJaggedTensor:
    size = ids.stride()
    bags = slice(start := ids.keys().index(feature) * size, start + size)
    starts, old_lengths = ids.offsets()[bags], ids.lengths()[bags]
    new_lengths = old_lengths[order]
    new_starts = starts[0] + new_lengths.cumsum(0) - new_lengths
    count = int(new_lengths.sum())
    shift = (starts[order] - new_starts).repeat_interleave(new_lengths, output_size=count)
    own = torch.arange(count, device=shift.device) + starts[0]
    values, lengths = ids.values().clone(), ids.lengths().clone()
    values[own] = ids.values()[own + shift]
    lengths[bags] = new_lengths
    return KeyedJaggedTensor(keys=ids.keys(), values=values, lengths=lengths, stride=size)
