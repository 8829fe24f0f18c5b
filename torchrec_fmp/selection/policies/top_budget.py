"""Keep the best features that a budget pays for: a count, bytes or milliseconds."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal

from torchrec_fmp.selection.costs import BudgetUnit, TableCost, divided
from torchrec_fmp.selection.feature_scores import FeatureScores
from torchrec_fmp.selection.policies.policy import Policy, drop, keep
from torchrec_fmp.selection.selection import Selection

_BYTES = {"B": 1.0, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40}
# Unit of the costs -> suffix of an amount -> its factor.
_SUFFIXES: dict[str, dict[str, float]] = {
    "features": {},
    "bytes": _BYTES,
    "hbm": _BYTES,
    "step_ms": {"ms": 1.0},
}


class TopBudget(Policy):
    """Keeps features, best first, until the budget does not pay for the next one.

    A table that several features share is paid for once. After the first feature that does not fit,
    only features that add no cost are kept, if their gate is not closed: dense columns, unless the
    unit is `features`, and features of tables that are already paid for. So a larger budget always
    keeps every feature that a smaller one keeps. The budget is never exceeded, except by the best
    feature, which is always kept, and by the best feature of a collection that would be empty (see
    `decide`).

    The order is a choice. `score` is the order of importance. One large table near the front can
    end the selection early. This order suits scores that reflect the costs, such as gates trained
    with a `TargetPenalty` in the same unit. `score_per_cost` is the greedy order of the knapsack
    problem (Dantzig 1957, "Discrete-variable extremum problems"). Large tables come late unless
    they are worth it. This order needs scores on a ratio scale; scores that are not positive come
    last, by score.

    Args:
        keep: share of the total cost, in (0, 1], or an amount: `40GiB`, `3.5ms`.
        unit: unit of the budget: `features`, which counts sparse and dense features, or a unit of
            `torchrec_fmp.costs`.
        order: order in which features are taken; ties by the model's order.

    Raises:
        ValueError: if `keep` is neither such a share nor an amount of the unit, or the unit or the
            order is unknown.
    """

    def __init__(
        self,
        keep: float | str,
        unit: BudgetUnit = "bytes",
        order: Literal["score", "score_per_cost"] = "score",
    ) -> None:
        if unit not in _SUFFIXES:
            raise ValueError(f"unit is {unit!r}; the units are {', '.join(_SUFFIXES)}")
        if order not in ("score", "score_per_cost"):
            raise ValueError(f"order is {order!r}; the orders are score and score_per_cost")
        if isinstance(keep, str):
            _parse_amount(keep, unit)
        elif not 0 < keep <= 1:
            raise ValueError(f"the share of the cost to keep is {keep}; it must be in (0, 1]")
        self.keep = keep
        self.unit = unit
        self.order = order
        self.cost_unit = None if unit == "features" else unit

    def select(self, scores: FeatureScores) -> Selection:
        """A decision for every feature, in the scores' order.

        Raises:
            ValueError: if `scores` has no costs and the unit is not `features`, or has costs of
                features without a score.
        """
        costs = self._costs(scores)
        parts: dict[str, set[int]] = {name: set() for name in scores.scores}
        for index, cost in enumerate(costs):
            for name in cost.features:
                parts[name].add(index)
        ranked = self._ranked(scores, costs)
        budget = self._budget(costs)
        taken: set[str] = set()
        paid: set[int] = set()
        for name in ranked:
            paid_with_it = paid | parts[name]
            # Exactly rounded, so that all features together cost the total in any order.
            spent = math.fsum(costs[index].amount for index in paid_with_it)
            if taken and spent > budget:
                break
            taken.add(name)
            paid = paid_with_it
        features = {}
        for rank, name in enumerate(ranked, start=1):
            reason = f"rank {rank} of {len(ranked)}, the budget pays for {len(taken)}"
            adds = any(costs[index].amount for index in parts[name] - paid)
            if name in taken:
                features[name] = keep(scores, name, reason)
            elif not adds and scores.gates[name] > 0:
                features[name] = keep(scores, name, f"{reason}, this one adds no {self.unit}")
            else:
                features[name] = drop(scores, name, reason)
        return Selection({name: features[name] for name in scores.scores})

    def _budget(self, costs: Sequence[TableCost]) -> float:
        if isinstance(self.keep, str):
            return _parse_amount(self.keep, self.unit)
        return self.keep * math.fsum(cost.amount for cost in costs)

    def _costs(self, scores: FeatureScores) -> Sequence[TableCost]:
        if self.unit == "features":
            return [TableCost((name,), 1.0) for name in scores.scores]
        if not scores.table_costs:
            raise ValueError(
                f"TopBudget needs costs in {self.unit}: use decide(scores, policy, "
                f"costs=table_costs(model, topology, {self.unit!r}))"
            )
        priced = {name for cost in scores.table_costs for name in cost.features}
        unknown = sorted(priced - scores.scores.keys())
        if unknown:
            raise ValueError(f"the costs include features that have no score: {unknown}")
        return scores.table_costs

    def _ranked(self, scores: FeatureScores, costs: Sequence[TableCost]) -> list[str]:
        """Features in the order in which they are taken."""
        if self.order == "score":
            return scores.ranked
        prices = divided(costs)

        def worth(name: str) -> float:
            score, price = scores.scores[name], prices.get(name, 0.0)
            if score <= 0:
                return score
            return score / price if price > 0 else math.inf

        return sorted(scores.scores, key=lambda name: -worth(name))


def _parse_amount(text: str, unit: str) -> float:
    suffixes = _SUFFIXES[unit]
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", text.strip())
    if match is None or match[2] not in suffixes or float(match[1]) == 0:
        allowed = f" or a number followed by {', '.join(suffixes)}" if suffixes else ""
        raise ValueError(
            f"the {unit} to keep are {text!r}: give a share of the total in (0, 1]{allowed}"
        )
    return float(match[1]) * suffixes[match[2]]
