"""Shuffling a feature moves whole bags and nothing else."""

from __future__ import annotations

import torch
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_fmp.scorers.permutation import shuffled

ORDER = torch.tensor([2, 0, 1])
BATCH = Batch(
    torch.arange(6.0).view(3, 2),
    KeyedJaggedTensor(
        keys=["a", "b", "c"],
        values=torch.tensor([1, 2, 3, 10, 11, 12, 20, 30, 31]),
        lengths=torch.tensor([1, 2, 0, 0, 3, 1, 0, 1, 1]),
    ),
    torch.tensor([0.0, 1.0, 0.0]),
)


def bags(batch: Batch) -> dict[str, list[list[int]]]:
    return {
        key: [bag.tolist() for bag in sequence.to_dense()]
        for key, sequence in batch.sparse_features.to_dict().items()
    }


def test_shuffling_a_sparse_feature_permutes_only_its_bags() -> None:
    before = bags(BATCH)
    assert before["b"] == [[], [10, 11, 12], [20]]
    after = shuffled(BATCH, "b", ("x", "y"), ORDER)
    assert bags(after) == {**before, "b": [[20], [], [10, 11, 12]]}
    assert torch.equal(after.dense_features, BATCH.dense_features)
    assert torch.equal(after.labels, BATCH.labels)
    assert bags(BATCH) == before


def test_shuffling_a_dense_column_permutes_only_its_values() -> None:
    after = shuffled(BATCH, "y", ("x", "y"), ORDER)
    assert after.dense_features.tolist() == [[0, 5], [2, 1], [4, 3]]
    assert bags(after) == bags(BATCH)
    assert BATCH.dense_features.tolist() == [[0, 1], [2, 3], [4, 5]]
