"""OutRank: mutual information of a feature and the label, corrected for cardinality."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from torchrec_fmp.scorers.pretraining import Pretraining
from torchrec_fmp.scorers.scorer import Scorer
from torchrec_fmp.scorers.tabular import Sample, check_rows, scores_from_sample
from torchrec_fmp.selection.feature_scores import FeatureScores


class MutualInformationScorer(Scorer):
    """H(Y'|X) - H(Y|X) in nats, for the label Y, the feature X and the shuffled labels Y'.

    Škrlj and Mramor 2023, "OutRank: Speeding up AutoML-based Model Search for Large Sparse Data
    sets with Cardinality-aware Feature Ranking" (RecSys); heuristic MI-numba-randomized of
    outbrain/outrank, algorithms/feature_ranking/ranking_mi_numba.py. H(Y) - H(Y|X) grows with the
    number of values of X even if they carry no information. H(Y') - H(Y'|X) grows in the same way,
    so the score of noise is about 0, and may be negative.

    For a value that occurs n times, OutRank's code uses the labels of n rows earlier as Y', because
    it considers permutations expensive. This changes the share of positives, and therefore the
    score, by about 1 / sqrt(rows), which exceeds the information in many features. Here Y' is one
    permutation for all features.

    Each feature is scored alone: a feature that matters only together with another scores 0. For
    a bag, X is one of its values, drawn at random, or marks an empty bag. This carries less
    information than the whole bag, but whole bags hardly repeat. A dense column is divided into
    bins of equal numbers of rows; OutRank uses its values unbinned, and few of them repeat.

    Args:
        rows: number of pretraining rows to read, over all ranks, in memory of rank 0.
        bins: number of bins for a dense column.

    Raises:
        ValueError: if rows is below 1 or bins below 2.
    """

    def __init__(self, rows: int = 1_000_000, bins: int = 32) -> None:
        if bins < 2:
            raise ValueError(f"bins is {bins}; it must be at least 2")
        self.rows = check_rows(rows)
        self.bins = bins

    def score(self, pretraining: Pretraining) -> FeatureScores:
        return scores_from_sample(pretraining, self.rows, self._importances)

    def _importances(self, sample: Sample, seed: int) -> dict[str, float]:
        shuffled = np.random.default_rng(seed).permutation(sample.labels)
        binned = [quantile_bins(column, self.bins) for column in sample.values.T]
        return {
            feature: corrected_information(sample.labels, shuffled, column)
            for feature, column in zip(sample.features, [*binned, *sample.ids.T], strict=True)
        }


def corrected_information(
    labels: npt.NDArray[np.bool_], shuffled: npt.NDArray[np.bool_], values: npt.NDArray[np.int64]
) -> float:
    """H(Y'|X) - H(Y|X) in nats.

    Args:
        labels: (N,) labels Y.
        shuffled: (N,) labels in another order, Y'.
        values: (N,) values of X, any integers.
    """
    _, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
    return _conditional_entropy(shuffled, codes, counts) - _conditional_entropy(
        labels, codes, counts
    )


def quantile_bins(values: npt.NDArray[np.float32], bins: int) -> npt.NDArray[np.int64]:
    """(N,) bin of each value, from 0; there are fewer than `bins` bins if values repeat."""
    edges = np.quantile(values, np.arange(1, bins) / bins)
    return np.searchsorted(np.unique(edges), values, side="right").astype(np.int64)


def _conditional_entropy(
    labels: npt.NDArray[np.bool_], codes: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]
) -> float:
    """H(Y|X) in nats; `codes` numbers the values of X, `counts` says how often each occurs."""
    share = np.bincount(codes, weights=labels) / counts
    # 0 log 1 stands in for 0 log 0, which would be NaN.
    entropies = -sum(p * np.log(np.where(p > 0, p, 1.0)) for p in (share, 1 - share))
    return float(entropies @ counts / len(labels))
