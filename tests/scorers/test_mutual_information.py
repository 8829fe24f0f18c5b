"""OutRank's score is a difference of conditional entropies; cardinality alone scores nothing."""

from __future__ import annotations

from math import log

import numpy as np
import pytest

from torchrec_fmp.scorers.mutual_information import corrected_information, quantile_bins


def test_the_score_equals_the_formula_by_hand() -> None:
    values = np.array([7, 7, 7, 7, -1, -1])
    labels = np.array([1, 1, 1, 0, 0, 0], dtype=bool)
    shuffled = np.array([1, 0, 1, 0, 1, 0], dtype=bool)
    # Three of the four rows with 7 are positive, and none with -1.
    of_labels = 4 / 6 * -(0.75 * log(0.75) + 0.25 * log(0.25))
    of_shuffled = log(2)
    assert corrected_information(labels, shuffled, values) == pytest.approx(of_shuffled - of_labels)


@pytest.mark.parametrize("cardinality", [1000, 100_000])
def test_the_correction_removes_what_noise_gains_from_its_cardinality(cardinality: int) -> None:
    random = np.random.default_rng(0)
    labels = random.random(20_000) < 0.2
    noise = random.integers(0, cardinality, len(labels))
    share = labels.mean()
    entropy = -share * log(share) - (1 - share) * log(1 - share)
    # Equal labels have no entropy, which leaves -H(Y|X).
    uncorrected = entropy + corrected_information(labels, np.ones_like(labels), noise)
    assert uncorrected > 0.02
    assert abs(corrected_information(labels, random.permutation(labels), noise)) < uncorrected / 10


def test_bins_hold_equal_numbers_of_rows() -> None:
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    bins = quantile_bins(values, 4)
    assert np.bincount(bins).tolist() == [250] * 4
    assert [values[bins == b].max() for b in range(3)] < [
        values[bins == b].min() for b in (1, 2, 3)
    ]


def test_repeated_values_share_a_bin() -> None:
    values = np.array([0.0] * 900 + [5.0] * 100, dtype=np.float32)
    assert (
        quantile_bins(values, 32).tolist()
        == [quantile_bins(values, 32)[0]] * 900 + [quantile_bins(values, 32)[-1]] * 100
    )
    assert len(set(quantile_bins(values, 32))) == 2
