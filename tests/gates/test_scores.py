"""Scores from the gates of a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchrec_fmp.data.schema import Schema, SparseColumn
from torchrec_fmp.gates.attach import attach_gates, feature_gates
from torchrec_fmp.gates.feature_gates import GateConfig
from torchrec_fmp.gates.scores import gate_scores
from torchrec_fmp.models.dlrm import DlrmBackbone

SCHEMA = Schema("y", ("x", "z"), (SparseColumn("a", 5), SparseColumn("b", 6)))
EBC = "model.sparse_arch.embedding_bag_collection"


@pytest.fixture
def model() -> nn.Module:
    backbone = DlrmBackbone(4, [4], [4])
    model = backbone.build(SCHEMA, torch.device("cpu"))
    return attach_gates(model, GateConfig(), backbone.dense_modules(SCHEMA))


def test_every_feature_is_scored_by_its_log_alpha_with_its_test_time_gate(
    model: nn.Module,
) -> None:
    values = {"a": -4.0, "b": 2.5, "x": 0.0, "z": -2.4}
    with torch.no_grad():
        for _, module in feature_gates(model):
            module.log_alpha.copy_(torch.tensor([values[name] for name in module.features]))
    scores = gate_scores(model)
    assert scores.scores == pytest.approx(values)
    assert scores.gates == pytest.approx({"a": 0.0, "b": 1.0, "x": 0.5, "z": 0.0})
    assert scores.collections == {EBC: ("a", "b")}


def test_a_model_without_gates_is_refused() -> None:
    with pytest.raises(ValueError, match="no gates: call attach_gates"):
        gate_scores(nn.Linear(2, 2))
