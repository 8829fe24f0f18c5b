"""Scores from the model's own gates."""

from __future__ import annotations

from torch import nn

from torchrec_fmp.gates.attach import embedding_features, feature_gates
from torchrec_fmp.scores.feature_scores import FeatureScores


def gate_scores(model: nn.Module) -> FeatureScores:
    """Scores each feature by its `log_alpha`.

    The order is that of P(z > 0), which is monotone in `log_alpha`, and does not saturate. Every
    rank holds the same gates, so every rank gets the same scores.

    Raises:
        ValueError: if the model has no gates.
    """
    scores: dict[str, float] = {}
    gates: dict[str, float] = {}
    for _, module in feature_gates(model):
        scores.update(zip(module.features, module.log_alpha.tolist(), strict=True))
        gates.update(zip(module.features, module.values().tolist(), strict=True))
    if not scores:
        raise ValueError("the model has no gates: call attach_gates before it is sharded")
    return FeatureScores(scores, gates, embedding_features(model))
