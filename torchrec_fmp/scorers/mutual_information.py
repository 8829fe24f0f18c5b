"""OutRank: mutual information of feature and label, corrected for the feature's cardinality."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from torchrec_fmp.scorers.pretraining import Pretraining
from torchrec_fmp.scorers.scorer import Scorer
from torchrec_fmp.scorers.tabular import Sample, check_rows, scores_from_sample
from torchrec_fmp.selection.feature_scores import FeatureScores


class MutualInformationScorer(Scorer):
    """H(Y'|X) - H(Y|X) in nats, where Y is the label, X the feature and Y' the labels shuffled.

    Škrlj and Mramor 2023, "OutRank: Speeding up AutoML-based Model Search for Large Sparse Data
    sets with Cardinality-aware Feature Ranking" (RecSys); heuristic MI-numba-randomized of
    outbrain/outrank, algorithms/feature_ranking/ranking_mi_numba.py. H(Y) - H(Y|X) grows with the
    number of values of X even where they say nothing; the same happens to Y', so the difference
    of noise is about 0, and may be negative.

    OutRank's code takes as Y' of a value that occurs n times the labels n rows before, because
    it finds permutations expensive. That changes the share of positives, and with it the score, by
    some 1 / sqrt(rows): more than many features say. Here it is one permutation for all features.

    Each feature is looked at alone: one that matters only together with another scores 0. Of a
    bag, X is one of its values, drawn at random, or that it is empty: less than the bag says, but
    bags as a whole hardly repeat. A dense column is cut into bins of equal numbers of rows;
    OutRank takes its values as they are, and few repeat.

    Args:
        rows: of pretraining to read, over all ranks, in memory of rank 0.
        bins: of a dense column.

    Raises:
        ValueError: if rows is below 1 or bins below 2.
    """

    def __init__(self, rows: int = 1_000_000, bins: int = 32) -> None:
        if bins < 2:
            raise ValueError(f"bins is {bins}, it must be at least 2")
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
        labels: (N,) Y.
        shuffled: (N,) Y', the same in another order.
        values: (N,) X, any integers.
    """
    _, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
    return _conditional_entropy(shuffled, codes, counts) - _conditional_entropy(
        labels, codes, counts
    )


def quantile_bins(values: npt.NDArray[np.float32], bins: int) -> npt.NDArray[np.int64]:
    """(N,) the bin of each value, from 0; fewer than `bins` where values repeat."""
    edges = np.quantile(values, np.arange(1, bins) / bins)
    return np.searchsorted(np.unique(edges), values, side="right").astype(np.int64)


def _conditional_entropy(
    labels: npt.NDArray[np.bool_], codes: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]
) -> float:
    """H(Y|X) in nats, where `codes` number the values of X and `counts` how often they occur."""
    share = np.bincount(codes, weights=labels) / counts
    # The logarithm of 1 in the place of 0 log 0.
    entropies = -sum(p * np.log(np.where(p > 0, p, 1.0)) for p in (share, 1 - share))
    return float(entropies @ counts / len(labels))
