"""Closed gates go, at exactly the documented boundary."""

from __future__ import annotations

import math

import pytest
import torch

from torchrec_fmp.gates.hard_concrete import HardConcrete
from torchrec_fmp.policies.closed_gates import ClosedGates
from torchrec_fmp.scores.feature_scores import FeatureScores


def test_features_with_gate_zero_go_and_all_others_stay() -> None:
    tiny = math.nextafter(0, 1)
    gates = {"a": 0.0, "b": tiny, "c": 1.0, "d": 0.0}
    scores = FeatureScores({"a": 9.0, "b": -9.0, "c": 0.0, "d": 1.0}, gates)
    selection = ClosedGates().select(scores)
    assert selection.kept == ["b", "c"]
    assert selection.gates == gates
    assert list(selection.features) == ["a", "b", "c", "d"]
    assert selection.features["a"].reason == "gate closed"
    assert selection.features["b"].score == -9.0


@pytest.mark.parametrize(("offset", "kept"), [(-1e-3, False), (1e-3, True)])
def test_the_boundary_is_where_the_test_time_gate_reaches_zero(offset: float, kept: bool) -> None:
    distribution = HardConcrete()
    assert distribution.closed_log_alpha == pytest.approx(-2.398, abs=1e-3)
    log_alpha = distribution.closed_log_alpha + offset
    gate = float(distribution.deterministic(torch.tensor([log_alpha])))
    selection = ClosedGates().select(FeatureScores({"a": log_alpha}, {"a": gate}))
    assert bool(selection.kept) is kept
