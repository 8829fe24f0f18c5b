"""Keep as few features as the validation loss allows: the size is found, not given."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from torchrec_fmp.selection.feature_scores import FeatureScores
from torchrec_fmp.selection.policies.policy import Policy, keep_best
from torchrec_fmp.selection.selection import Selection


class BestSize(Policy):
    """Keeps the smallest number of best features whose validation loss is no worse than the best.

    A loss is no worse if its mean paired difference over validation batches is at most
    `standard_errors` times the standard error: the one-standard-error rule of Breiman et al. 1984,
    "Classification and Regression Trees", section 3.4.3, for paired batches. The losses are
    measured on the scored model before any further training, so the choice errs towards keeping
    features.

    Args:
        standard_errors: number of standard errors that counts as no worse; 0 keeps the best size.
        batches: number of validation batches on each rank; each is read for about 20 sizes.

    Raises:
        ValueError: if `standard_errors` is negative or there are fewer than two batches.
    """

    def __init__(self, standard_errors: float = 1.0, batches: int = 50) -> None:
        if not standard_errors >= 0:
            raise ValueError(f"standard_errors is {standard_errors}; it must be at least 0")
        if batches < 2:
            raise ValueError(f"batches is {batches}; it must be at least 2, for a standard error")
        self.standard_errors = standard_errors
        self.batches = batches

    def select(self, scores: FeatureScores) -> Selection:
        """Decides from the validation losses.

        Raises:
            ValueError: if the scores have no validation losses.
        """
        if not scores.losses:
            raise ValueError(
                "the scores have no validation losses: pass them through "
                "torchrec_fmp.scorers.size_curve.with_losses, as a run does"
            )
        count = smallest_size(scores.losses, self.standard_errors)
        return keep_best(scores, count, f"{count} are as good as any number")


def smallest_size(losses: Mapping[int, Sequence[float]], standard_errors: float) -> int:
    """The smallest size that is no worse than the size with the lowest mean loss.

    Args:
        losses: size -> losses of the same two or more batches.
        standard_errors: number of standard errors of the mean paired difference that counts as no
            worse.
    """
    best = min(losses, key=lambda size: statistics.fmean(losses[size]))

    def is_no_worse(size: int) -> bool:
        differences = [a - b for a, b in zip(losses[size], losses[best], strict=True)]
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        return statistics.fmean(differences) <= standard_errors * error

    return min(size for size in losses if is_no_worse(size))
