"""The features of a gated model in a fixed order, and scores in that order."""

from __future__ import annotations

from torch import Tensor, nn

from torchrec_fmp.gates.attach import embedding_features, feature_gates
from torchrec_fmp.selection.feature_scores import FeatureScores


def features_of(model: nn.Module) -> tuple[str, ...]:
    """Every gated feature of the model, including dense columns, exactly once.

    Raises:
        ValueError: if the model has no gates.
    """
    features = [name for _, gates in feature_gates(model) for name in gates.features]
    if not features:
        raise ValueError("the model has no gates: call attach_gates before it is sharded")
    return tuple(features)


def scores_of(model: nn.Module, values: Tensor, gates: Tensor | None = None) -> FeatureScores:
    """Scores of the features in `features_of(model)`.

    Args:
        model: model with gates, sharded or not.
        values: (F,) scores in the order of `features_of`.
        gates: (F,) test-time gates in [0, 1]; None for all 1, if the scorer has no gates.
    """
    features = features_of(model)
    gate_values = [1.0] * len(features) if gates is None else gates.tolist()
    return FeatureScores(
        dict(zip(features, values.tolist(), strict=True)),
        dict(zip(features, gate_values, strict=True)),
        embedding_features(model),
    )
