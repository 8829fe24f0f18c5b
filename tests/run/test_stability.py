"""Agreement of predictions and selections over seeds, against their definitions."""

from __future__ import annotations

import math
import statistics
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchrec_fmp.report.stability import format_stability
from torchrec_fmp.run.stability import (
    SeedRun,
    consistency,
    jaccard,
    prediction_deviation,
    stability_of,
)
from torchrec_fmp.selection.selection import FeatureDecision, Selection
from torchrec_fmp.training.metrics import metrics_of

LABELS = torch.tensor([1.0, 0.0, 0.0, 0.0])


def tables(values: st.SearchStrategy[float]) -> st.SearchStrategy[list[list[float]]]:
    """2 to 5 runs with the same number of rows."""
    return st.integers(1, 6).flatmap(
        lambda rows: st.lists(
            st.lists(values, min_size=rows, max_size=rows), min_size=2, max_size=5
        )
    )


def select(kept: str) -> Selection:
    return Selection(
        {
            name: FeatureDecision(0.0, float(name in kept), name in kept, "for the test")
            for name in "abcd"
        }
    )


def seed_run(seed: int, kept: str, full: list[float], final: list[float]) -> SeedRun:
    logits = {"full": torch.tensor(full), "final": torch.tensor(final)}
    models = logits | {"pruned": logits["final"]}
    metrics = {
        name: metrics_of(models[name].double(), LABELS.double())
        for name in ("full", "pruned", "final")
    }
    return SeedRun(seed, select(kept), metrics, logits)


@given(tables(st.sampled_from([0.0, 1.0])))
def test_consistency_is_the_share_of_equal_decisions_over_all_pairs_of_runs(
    rows: list[list[float]],
) -> None:
    equal = [
        sum(a == b for a, b in zip(one, other, strict=True)) / len(one)
        for one, other in combinations(rows, 2)
    ]
    assert consistency(torch.tensor(rows).bool()) == pytest.approx(statistics.mean(equal))


@given(tables(st.floats(0, 1)))
def test_deviation_is_the_mean_deviation_of_each_rows_predictions(rows: list[list[float]]) -> None:
    by_row = [statistics.stdev(column) for column in zip(*rows, strict=True)]
    probabilities = torch.tensor(rows, dtype=torch.float64)
    assert prediction_deviation(probabilities) == pytest.approx(statistics.mean(by_row), abs=1e-9)


def test_jaccard_index_is_the_mean_over_all_pairs() -> None:
    a, b, c = frozenset("ab"), frozenset("abc"), frozenset("d")
    assert jaccard([a, b, c]) == pytest.approx((2 / 3 + 0 + 0) / 3)
    assert jaccard([a, a]) == 1


def logit(*probabilities: float) -> list[float]:
    values: Tensor = torch.logit(torch.tensor(probabilities))
    return values.tolist()


def test_decisions_use_the_base_rate_and_selections_are_compared_by_feature() -> None:
    # The base rate is 0.25: the second row's decisions differ in the full models alone.
    runs = [
        seed_run(0, "abc", logit(0.9, 0.2, 0.1, 0.1), logit(0.9, 0.2, 0.1, 0.1)),
        seed_run(1, "abd", logit(0.9, 0.3, 0.1, 0.1), logit(0.8, 0.2, 0.1, 0.1)),
    ]
    found = stability_of(runs, LABELS, world_size=1)
    assert found["threshold"] == 0.25
    assert found["test_rows"] == 4
    assert found["predictions"]["full"]["consistency"] == 0.75
    assert found["predictions"]["final"]["consistency"] == 1.0
    expected = statistics.stdev([0.2, 0.3]) / 4
    assert found["predictions"]["full"]["sd"] == pytest.approx(expected, rel=1e-6)
    selections = found["selections"]
    assert selections["jaccard"] == 0.5
    assert selections["decided_alike"] == 0.5
    assert selections["decided_differently"] == ["c", "d"]
    assert selections["features_kept"] == {"mean": 3.0, "sd": 0.0}
    losses = [run.metrics["final"].logloss for run in runs]
    assert found["metrics"]["final"]["logloss"] == pytest.approx(
        {"mean": statistics.mean(losses), "sd": statistics.stdev(losses)}
    )
    assert [run["kept"] for run in found["runs"]] == [["a", "b", "c"], ["a", "b", "d"]]
    report = format_stability(found)
    assert "2 of 4 in all seeds" in report
    assert "differ   c, d" in report


def test_a_test_split_of_one_class_has_agreement_but_no_auc() -> None:
    labels = torch.zeros(2, dtype=torch.float64)
    logits = torch.tensor([0.5, -0.5])
    metrics = dict.fromkeys(("full", "pruned", "final"), metrics_of(logits.double(), labels))
    runs = [SeedRun(s, select("a"), metrics, {"full": logits, "final": logits}) for s in (0, 1)]
    found = stability_of(runs, labels, world_size=1)
    assert math.isnan(found["metrics"]["full"]["auc"]["mean"])
    assert found["predictions"]["full"]["consistency"] == 1.0
    assert found["predictions"]["full"]["sd"] == 0.0
    assert " - " in format_stability(found)
