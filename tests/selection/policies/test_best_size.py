"""The smallest number of features whose validation loss is no worse than the best."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_fmp.selection.feature_scores import FeatureScores
from torchrec_fmp.selection.policies.best_size import BestSize, smallest_size

LOSSES = st.dictionaries(
    st.integers(1, 30),
    st.lists(st.floats(0.0, 10.0), min_size=4, max_size=4),
    min_size=1,
)


def test_a_size_is_as_good_within_the_standard_error_of_the_paired_difference() -> None:
    # Size 2 loses 0.0 and 0.2 more than the best: mean 0.1, standard error 0.1. The losses differ
    # far more between the batches.
    losses = {1: [5.3, 9.3], 2: [5.0, 9.2], 3: [5.0, 9.0], 4: [5.1, 9.0]}
    assert smallest_size(losses, 1.0001) == 2
    assert smallest_size(losses, 0.9999) == 3
    assert smallest_size(losses, 0.0) == 3


@given(LOSSES, st.floats(0.0, 3.0), st.floats(0.0, 3.0))
def test_more_tolerance_never_keeps_more_features_nor_more_than_the_best_size(
    losses: dict[int, list[float]], first: float, second: float
) -> None:
    low, high = sorted((first, second))
    means = {size: statistics.fmean(values) for size, values in losses.items()}
    best = max(size for size, mean in means.items() if mean == min(means.values()))
    assert smallest_size(losses, high) <= smallest_size(losses, low) <= best


def test_the_best_features_up_to_the_chosen_size_are_kept() -> None:
    scores = {"a": 1.0, "b": 3.0, "c": 2.0}
    losses = {1: [0.7, 0.9], 2: [0.5, 0.5], 3: [0.5, 0.5]}
    selection = BestSize().select(FeatureScores(scores, dict.fromkeys(scores, 0.5), losses=losses))
    assert selection.kept == ["b", "c"]
    assert list(selection.features) == ["a", "b", "c"]
    assert selection.features["a"].reason == "rank 3 of 3, 2 are as good as any number"
    assert selection.gates == {"a": 0.0, "b": 0.5, "c": 0.5}


def test_scores_without_validation_losses_are_refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match="with_losses"):
        BestSize().select(FeatureScores({"a": 1.0}, {"a": 1.0}))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [((-1.0,), "standard_errors"), ((math.nan,), "standard_errors"), ((1.0, 1), "batches")],
)
def test_invalid_arguments_are_refused(arguments: tuple[float, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        BestSize(*arguments)
