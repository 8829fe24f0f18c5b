"""The exact area under the ROC curve of planted and learned logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def exact_auc(logits: Tensor, labels: Tensor) -> float:
    """The Mann-Whitney statistic of logits, because their sigmoids tie where they saturate.

    Args:
        logits: (N,) float64 logits.
        labels: (N,) float64 labels, 0 or 1.

    Returns:
        The area; NaN if all labels are equal.
    """
    positive = float(labels.sum())
    if positive in (0.0, float(labels.numel())):
        return math.nan
    _, value, counts = torch.unique(logits, return_inverse=True, return_counts=True)
    # Equal logits share the mean of their ranks.
    ranks = (counts.cumsum(0) - (counts.double() - 1) / 2)[value]
    wins = float((ranks * labels).sum()) - positive * (positive + 1) / 2
    return wins / (positive * (labels.numel() - positive))
