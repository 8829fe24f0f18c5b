"""The interface of a schedule, and `decide_prune`, which decides for one of its prunes."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import replace

from torchrec_fmp.selection.costs import TableCost
from torchrec_fmp.selection.feature_scores import FeatureScores
from torchrec_fmp.selection.policies.policy import Policy, decide, drop, keep
from torchrec_fmp.selection.selection import Selection

# Shares are powers, so 9 features may come out as 9.000000000000002.
_ROUNDING = 1e-9


class Schedule(abc.ABC):
    """The number of prunes, and the share of features that each of them keeps."""

    prunes: int = 1

    @abc.abstractmethod
    def share(self, prune: int, keep: float) -> float:
        """The share of all features that a prune keeps.

        Args:
            prune: number of the prune, from 1 to `prunes`.
            keep: share that the last prune keeps, in (0, 1].

        Returns:
            At least `keep`, at most the share of the previous prune; `keep` for the last prune.
        """

    def is_last(self, prune: int) -> bool:
        """Whether this is the last prune, which the policy alone decides."""
        return prune == self.prunes


def decide_prune(
    scores: FeatureScores,
    policy: Policy,
    schedule: Schedule,
    prune: int,
    *,
    earlier: Selection | None = None,
    costs: Sequence[TableCost] | None = None,
) -> Selection:
    """Decides for one prune of a schedule, over all features of the full model.

    The policy decides as if this were the last prune. It sees dropped features with a closed gate
    and a score below every other, so that shares refer to the full model. A prune before the last
    keeps the policy's features and the best of the rest, as many as the schedule says; fully closed
    gates among them open again. Dropped features stay dropped, with their earlier decision.

    Args:
        scores: scores of the remaining features.
        policy: policy to apply.
        schedule: schedule of the prunes.
        prune: number of the prune, from 1.
        earlier: decisions of the previous prune; None for the first.
        costs: costs in the full model, in the policy's `cost_unit`; None if it has no unit.

    Raises:
        ValueError: if the policy cannot decide from the scores or the costs.
    """
    gone = {} if earlier is None else {n: d for n, d in earlier.features.items() if not d.kept}
    order = list(scores.scores) if earlier is None else list(earlier.features)
    features = dict(decide(_with_gone(scores, order), policy, costs).features)
    if not schedule.is_last(prune):
        kept = {name for name in scores.scores if features[name].kept}
        share = schedule.share(prune, len(kept) / len(order))
        count = math.ceil(len(order) * share - _ROUNDING)
        ranked = sorted(scores.scores, key=lambda name: (name not in kept, -scores.scores[name]))
        for rank, name in enumerate(ranked, start=1):
            decision = keep if rank <= count else drop
            reason = f"prune {prune} of {schedule.prunes}, rank {rank}, {count} stay"
            features[name] = decision(scores, name, reason)
    return Selection({name: gone.get(name, features[name]) for name in order})


def _with_gone(scores: FeatureScores, order: Sequence[str]) -> FeatureScores:
    """The scores of all features in `order`; dropped ones score below 0, also for ratios."""
    lowest = math.nextafter(min(0.0, *scores.scores.values()), -math.inf)
    return replace(
        scores,
        scores={name: scores.scores.get(name, lowest) for name in order},
        gates={name: scores.gates.get(name, 0.0) for name in order},
    )
