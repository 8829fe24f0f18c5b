"""In a table of columns, one of its ids represents a bag."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_fmp.scorers.tabular import EMPTY, drawn_ids


def batch_of(bags: list[list[list[int]]]) -> Batch:
    """A batch of bags, given by feature and example."""
    flat = [bag for feature in bags for bag in feature]
    ids = KeyedJaggedTensor(
        keys=[f"f{f}" for f in range(len(bags))],
        values=torch.tensor([i for bag in flat for i in bag], dtype=torch.int64),
        lengths=torch.tensor([len(bag) for bag in flat], dtype=torch.int32),
        stride=len(bags[0]),
    )
    return Batch(torch.zeros(len(bags[0]), 0), ids, torch.zeros(len(bags[0])))


bag = st.lists(st.integers(0, 99), max_size=4)
features = st.integers(1, 5).flatmap(
    lambda size: st.lists(st.lists(bag, min_size=size, max_size=size), min_size=1, max_size=3)
)


@given(features, st.integers(0, 1000))
def test_the_drawn_id_is_in_the_bag_or_marks_it_as_empty(
    bags: list[list[list[int]]], seed: int
) -> None:
    drawn = drawn_ids(batch_of(bags), torch.Generator().manual_seed(seed))
    assert drawn.shape == (len(bags[0]), len(bags))
    for f, feature in enumerate(bags):
        for b, ids in enumerate(feature):
            assert int(drawn[b, f]) in (ids or [EMPTY])


def test_ids_of_a_bag_are_drawn_equally_often() -> None:
    drawn = drawn_ids(batch_of([[[3, 5, 9]] * 3000]), torch.Generator().manual_seed(0))
    ids, counts = drawn.unique(return_counts=True)
    assert ids.tolist() == [3, 5, 9]
    assert all(900 < count < 1100 for count in counts)
