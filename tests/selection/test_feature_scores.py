"""Scores that cannot be ranked are refused."""

from __future__ import annotations

import pytest

from torchrec_fmp.selection.feature_scores import FeatureScores


def test_features_must_have_both_a_score_and_a_gate() -> None:
    with pytest.raises(ValueError, match=r"not both: \['b', 'c'\]"):
        FeatureScores({"a": 1.0, "b": 1.0}, {"a": 1.0, "c": 1.0})


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_is_refused(score: float) -> None:
    with pytest.raises(ValueError, match=f"score of feature 'a' is {score}; it must be finite"):
        FeatureScores({"a": score}, {"a": 1.0})


@pytest.mark.parametrize("gate", [-0.1, 1.1, float("nan")])
def test_a_gate_out_of_range_is_refused(gate: float) -> None:
    with pytest.raises(ValueError, match=f"gate of feature 'a' is {gate}; it must be in"):
        FeatureScores({"a": 1.0}, {"a": gate})
