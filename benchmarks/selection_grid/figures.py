"""The figures of the report: paired differences, areas over the kept fraction, rank agreement."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Two-sided 95% quantiles of Student's t for 1 to 30 degrees of freedom.
_T_95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Args:
        mean: NaN without values.
        deviation: standard deviation, of n - 1; NaN below two values.
        half_width: of the 95% confidence interval by Student's t; NaN below two values. With more
            than 31 values it is that of 31, a little too wide.
        count: number of values.
    """

    mean: float
    deviation: float
    half_width: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Estimate:
        count = len(values)
        mean = statistics.fmean(values) if values else math.nan
        if count < 2:
            return Estimate(mean, math.nan, math.nan, count)
        deviation = statistics.stdev(values)
        quantile = _T_95[min(count - 1, len(_T_95)) - 1]
        return Estimate(mean, deviation, quantile * deviation / math.sqrt(count), count)

    @property
    def is_clear(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return abs(self.mean) > self.half_width


def paired(values: Mapping[int, float], others: Mapping[int, float]) -> Estimate:
    """Of value minus other, over the seeds that both have."""
    return Estimate.of([values[seed] - others[seed] for seed in values if seed in others])


def area(differences: Mapping[float, float]) -> float:
    """Area under the differences over the kept fraction, up to 1, where they are 0: trapezoids.

    Args:
        differences: kept fraction, below 1 -> difference to the full model.
    """
    points = [*sorted(differences.items()), (1.0, 0.0)]
    return sum((right - left) * (a + b) / 2 for (left, a), (right, b) in itertools.pairwise(points))


def spearman(scores: Mapping[str, float], others: Mapping[str, float]) -> float:
    """Spearman's rank correlation of two scorings of the same features; NaN if one is constant."""
    names = list(scores)
    ranks, other_ranks = (
        _ranks(np.array([scoring[name] for name in names])) for scoring in (scores, others)
    )
    if ranks.std() == 0 or other_ranks.std() == 0:
        return math.nan
    return float(np.corrcoef(ranks, other_ranks)[0, 1])


def jaccard(names: Collection[str], others: Collection[str]) -> float:
    """Features in both over features in either."""
    return len({*names} & {*others}) / len({*names} | {*others})


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(N,) rank of each value; equal ones share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
