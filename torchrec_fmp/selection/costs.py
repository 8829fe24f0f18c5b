"""Types for the cost of keeping features; `planning` computes the figures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Unit = Literal["bytes", "hbm", "step_ms"]
"""Bytes of weights, all bytes that a table takes on a device, or milliseconds of a step."""

BudgetUnit = Literal["features", "bytes", "hbm", "step_ms"]
"""A `Unit`, or 1 for each feature."""


@dataclass(frozen=True)
class TableCost:
    """A cost that is paid once, as long as any of the features is kept.

    Args:
        features: features of one table.
        amount: cost, at least 0, in the unit of the costs.
    """

    features: tuple[str, ...]
    amount: float


def divided(costs: Iterable[TableCost]) -> dict[str, float]:
    """Feature -> its equal share of each of its costs; the sum does not change."""
    by_feature: dict[str, float] = defaultdict(float)
    for cost in costs:
        for feature in cost.features:
            by_feature[feature] += cost.amount / len(cost.features)
    return dict(by_feature)
