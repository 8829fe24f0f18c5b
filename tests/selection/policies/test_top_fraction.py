"""A share of the features is kept: the best ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_fmp.selection.feature_scores import FeatureScores
from torchrec_fmp.selection.policies.top_fraction import TopFraction


def scored(*scores: float, gate: float = 1.0) -> FeatureScores:
    names = [f"f{i}" for i in range(len(scores))]
    return FeatureScores(dict(zip(names, scores, strict=True)), dict.fromkeys(names, gate))


@given(
    st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=12),
    st.floats(0, 1, exclude_min=True),
)
def test_the_requested_number_of_best_features_is_kept_with_ties_by_order(
    values: list[float], fraction: float
) -> None:
    selection = TopFraction(fraction).select(scored(*values))
    count = max(1, round(fraction * len(values)))
    best = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    assert selection.kept == [f"f{i}" for i in sorted(best)]
    assert list(selection.features) == [f"f{i}" for i in range(len(values))]


def test_the_reason_states_the_rank() -> None:
    features = TopFraction(0.5).select(scored(1.0, 3.0, 2.0, 0.0)).features
    assert features["f1"].reason == "rank 1 of 4, 2 stay"
    assert features["f3"].reason == "rank 4 of 4, 2 stay"


def test_a_kept_feature_whose_gate_is_closed_is_opened() -> None:
    selection = TopFraction(0.5).select(scored(1.0, 0.0, gate=0.0))
    assert selection.gates == {"f0": 1.0, "f1": 0.0}


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=rf"keep is {fraction}; it must be in \(0, 1\]"):
        TopFraction(fraction)
