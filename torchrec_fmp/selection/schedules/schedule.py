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

# A share is raised to powers: 9 features may come out as 9.000000000000002.
_ROUNDING = 1e-9


class Schedule(abc.ABC):
    """How many prunes there are, and how much each of them leaves."""

    prunes: int = 1

    @abc.abstractmethod
    def share(self, prune: int, keep: float) -> float:
        """The share of all that a prune leaves.

        Args:
            prune: its number, from 1 to `prunes`.
            keep: share that the last one leaves, in (0, 1].

        Returns:
            At least `keep`, not more than the prune before leaves; `keep` for the last one.
        """

    def is_last(self, prune: int) -> bool:
        """Whether the policy alone decides, and nothing is pruned again."""
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
    """Decides for one prune of a schedule, over all features that the first model had.

    The policy is asked what it would keep if this were the last prune. It sees what is gone with
    its gate closed and a score below every other, so that a share means that of the first model. A
    prune that is not the last keeps what the policy keeps and the best of the rest, as many as the
    schedule says, with gates closed altogether opened again. What is gone stays gone, with the
    decision that it went by.

    Args:
        scores: of the features that are left.
        policy: decides.
        schedule: of the prunes.
        prune: its number, from 1.
        earlier: the decisions of the prune before; None at the first.
        costs: of the first model, in the policy's `cost_unit`; None where it has none.

    Raises:
        ValueError: if the policy cannot decide by the scores or the costs.
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
    """The scores of all features in `order`; not positive for what is gone, also for ratios."""
    lowest = math.nextafter(min(0.0, *scores.scores.values()), -math.inf)
    return replace(
        scores,
        scores={name: scores.scores.get(name, lowest) for name in order},
        gates={name: scores.gates.get(name, 0.0) for name in order},
    )
