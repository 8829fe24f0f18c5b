"""Scores from the model's own gates."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from torchrec_fmp.gates.attach import embedding_features, feature_gates
from torchrec_fmp.gates.feature_gates import FeatureGates
from torchrec_fmp.selection.feature_scores import FeatureScores


def gate_scores(model: nn.Module) -> FeatureScores:
    """Scores each feature by its `log_alpha`.

    P(z > 0) is monotone in `log_alpha`, so both order features alike, and `log_alpha` does not
    saturate. Every rank holds the same gates, so every rank gets the same scores.

    Raises:
        ValueError: if the model has no gates.
    """
    modules = [module for _, module in feature_gates(model)]
    scores = by_feature(modules, [module.log_alpha for module in modules])
    if not scores:
        raise ValueError("the model has no gates: call attach_gates before it is sharded")
    gates = by_feature(modules, [module.values() for module in modules])
    return FeatureScores(scores, gates, embedding_features(model))


def by_feature(gates: Sequence[FeatureGates], values: Sequence[Tensor]) -> dict[str, float]:
    """Feature -> its value, from one tensor (F,) per module of gates."""
    return {
        feature: value
        for module, of_module in zip(gates, values, strict=True)
        for feature, value in zip(module.features, of_module.tolist(), strict=True)
    }
