"""Features with closed gates are dropped, at exactly the documented boundary."""

from __future__ import annotations

import math

import pytest
import torch

from torchrec_fmp.gates.hard_concrete import HardConcrete
from torchrec_fmp.selection.feature_scores import FeatureScores
from torchrec_fmp.selection.policies.closed_gates import ClosedGates


def test_features_with_a_gate_up_to_the_threshold_are_dropped_and_all_others_kept() -> None:
    above = math.nextafter(0.25, 1)
    gates = {"a": 0.25, "b": above, "c": 1.0, "d": 0.0}
    scores = FeatureScores({"a": 9.0, "b": -9.0, "c": 0.0, "d": 1.0}, gates)
    selection = ClosedGates(0.25).select(scores)
    assert selection.kept == ["b", "c"]
    assert selection.gates == {**gates, "a": 0.0}
    assert list(selection.features) == ["a", "b", "c", "d"]
    assert selection.features["a"].reason == "gate closed to 0.25"
    assert selection.features["b"].score == -9.0


@pytest.mark.parametrize(("offset", "kept"), [(-1e-3, False), (1e-3, True)])
@pytest.mark.parametrize(("threshold", "boundary"), [(0.0, -2.398), (0.5, 0.0)])
def test_the_boundary_is_at_the_documented_log_alpha(
    threshold: float, boundary: float, offset: float, kept: bool
) -> None:
    log_alpha = boundary + offset
    gate = float(HardConcrete().deterministic(torch.tensor([log_alpha])))
    selection = ClosedGates(threshold).select(FeatureScores({"a": log_alpha}, {"a": gate}))
    assert bool(selection.kept) is kept


@pytest.mark.parametrize("threshold", [-0.1, 1.0, math.nan])
def test_invalid_threshold_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        ClosedGates(threshold)
