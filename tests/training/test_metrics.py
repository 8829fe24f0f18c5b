"""AUC, logloss and normalized entropy against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchrec_fmp.training.metrics import metrics_of


def tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def reference(logits: list[float], labels: list[int]) -> tuple[float, float, float]:
    """AUC by comparing every pair, the others by plain arithmetic."""
    ones = [x for x, y in zip(logits, labels, strict=True) if y]
    zeros = [x for x, y in zip(logits, labels, strict=True) if not y]
    wins = sum((a > b) + 0.5 * (a == b) for a in ones for b in zeros)
    losses = [
        -math.log(1 / (1 + math.exp(-x if y else x))) for x, y in zip(logits, labels, strict=True)
    ]
    logloss = sum(losses) / len(losses)
    share = len(ones) / len(labels)
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    return wins / (len(ones) * len(zeros)), logloss, logloss / entropy


rows = st.lists(st.tuples(st.integers(-6, 6).map(lambda i: i / 2), st.integers(0, 1)), min_size=2)


@given(rows.filter(lambda pairs: len({label for _, label in pairs}) == 2))
def test_metrics_equal_their_definitions_with_ties(pairs: list[tuple[float, int]]) -> None:
    logits, labels = [logit for logit, _ in pairs], [label for _, label in pairs]
    metrics = metrics_of(tensor(logits), tensor([float(label) for label in labels]))
    expected = reference(logits, labels)
    assert (metrics.auc, metrics.logloss, metrics.ne) == pytest.approx(expected, rel=1e-12)


def test_equal_predictions_have_the_auc_of_chance() -> None:
    assert metrics_of(tensor([0.3] * 5), tensor([0, 1, 1, 0, 1])).auc == 0.5


def test_logits_whose_sigmoids_are_equal_are_still_ranked() -> None:
    assert metrics_of(tensor([40.0, 50.0]), tensor([0, 1])).auc == 1.0
    assert metrics_of(tensor([-900.0, -800.0]), tensor([0, 1])).auc == 1.0


def test_predicting_the_mean_has_normalized_entropy_one() -> None:
    labels = tensor([0, 1, 0, 0, 0])
    logits = torch.logit(labels.mean()).expand(5)
    assert metrics_of(logits, labels).ne == pytest.approx(1.0)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_a_split_of_one_class_has_only_a_logloss(label: float) -> None:
    metrics = metrics_of(tensor([0.0, 0.0]), tensor([label, label]))
    assert metrics.logloss == pytest.approx(math.log(2))
    assert math.isnan(metrics.auc)
    assert math.isnan(metrics.ne)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_prediction_that_is_not_finite_is_an_error(value: float) -> None:
    with pytest.raises(ValueError, match="not finite: training has diverged"):
        metrics_of(tensor([0.0, value]), tensor([0, 1]))


def test_an_empty_split_is_an_error() -> None:
    with pytest.raises(ValueError, match="no rows to evaluate"):
        metrics_of(tensor([]), tensor([]))
