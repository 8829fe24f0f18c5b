"""A budget of features, bytes or milliseconds is kept, and spent on the best features first."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_fmp.selection.costs import TableCost
from torchrec_fmp.selection.feature_scores import FeatureScores
from torchrec_fmp.selection.policies.policy import decide
from torchrec_fmp.selection.policies.top_budget import TopBudget

NAMES = [f"f{i}" for i in range(8)]
shares = st.floats(0, 1, exclude_min=True)
orders = st.sampled_from(["score", "score_per_cost"])


@st.composite
def priced(draw: st.DrawFn) -> FeatureScores:
    """Up to 8 features; tables may be shared, and features may have several, one or none."""
    names = NAMES[: draw(st.integers(1, len(NAMES)))]
    score = st.integers(-3, 3).map(float) | st.floats(-5, 5)
    table = st.builds(
        TableCost,
        st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True).map(tuple),
        st.floats(0, 1e12) | st.sampled_from([0.0, 0.1, 0.2, 0.3]),
    )
    return FeatureScores(
        scores={name: draw(score) for name in names},
        gates={name: draw(st.sampled_from([0.0, 0.4, 1.0])) for name in names},
        table_costs=draw(st.lists(table, min_size=1, max_size=8)),
    )


def spent(scores: FeatureScores, kept: list[str]) -> float:
    return math.fsum(c.amount for c in scores.table_costs if set(c.features) & set(kept))


def scored(costs: dict[str, float], scores: dict[str, float], gate: float = 1.0) -> FeatureScores:
    parts = [TableCost((name,), amount) for name, amount in costs.items()]
    return FeatureScores(scores, dict.fromkeys(scores, gate), table_costs=parts)


@settings(max_examples=300, deadline=None)
@given(priced(), shares, orders)
def test_only_the_tables_of_a_single_feature_may_exceed_the_budget(
    scores: FeatureScores, keep: float, order: Any
) -> None:
    kept = TopBudget(keep, order=order).select(scores).kept
    assert kept
    total = math.fsum(cost.amount for cost in scores.table_costs)
    if spent(scores, kept) > keep * total:
        assert any(spent(scores, kept) == spent(scores, [name]) for name in kept)


@settings(max_examples=300, deadline=None)
@given(priced(), shares, shares, orders)
def test_a_larger_budget_keeps_every_feature_that_a_smaller_one_keeps(
    scores: FeatureScores, one: float, other: float, order: Any
) -> None:
    small, large = (
        set(TopBudget(keep, order=order).select(scores).kept) for keep in sorted((one, other))
    )
    assert small <= large


@given(priced(), orders)
def test_a_budget_of_the_whole_cost_keeps_every_feature_despite_rounding(
    scores: FeatureScores, order: Any
) -> None:
    selection = TopBudget(1.0, order=order).select(scores)
    assert selection.kept == list(scores.scores)


@given(priced(), shares)
def test_by_score_no_dropped_feature_is_better_than_a_kept_feature_with_a_cost(
    scores: FeatureScores, keep: float
) -> None:
    selection = TopBudget(keep).select(scores)
    for name in selection.kept:
        others = [other for other in selection.kept if other != name]
        if spent(scores, selection.kept) > spent(scores, others):
            assert all(scores.scores[name] >= scores.scores[d] for d in selection.dropped)


def test_every_feature_counts_as_one_including_dense_columns() -> None:
    scores = scored({}, {"a": 1.0, "b": 4.0, "c": 2.0, "d": 3.0})
    assert TopBudget(0.5, "features").select(scores).kept == ["b", "d"]
    assert TopBudget(0.74, "features").select(scores).kept == ["b", "d"]


def test_a_shared_table_is_paid_once_and_then_its_other_features_are_free() -> None:
    scores = FeatureScores(
        {"a": 3.0, "b": 2.0, "c": 1.0},
        dict.fromkeys("abc", 1.0),
        table_costs=[TableCost(("a", "c"), 60.0), TableCost(("b",), 40.0)],
    )
    assert TopBudget(0.6).select(scores).kept == ["a", "c"]
    # Half of the shared table is not enough for either of its features.
    flipped = replace(scores, scores={"a": 2.0, "b": 3.0, "c": 1.0})
    assert TopBudget(0.9).select(flipped).kept == ["b"]


def test_two_tables_of_equal_cost_and_features_are_both_paid() -> None:
    scores = FeatureScores(
        {"a": 1.0, "b": 2.0},
        dict.fromkeys("ab", 1.0),
        table_costs=[TableCost(("a",), 30.0), TableCost(("a",), 30.0), TableCost(("b",), 40.0)],
    )
    assert TopBudget(0.7).select(scores).kept == ["b"]


def test_a_free_feature_beyond_the_budget_is_kept_unless_its_gate_is_closed() -> None:
    scores = FeatureScores(
        {"best": 4.0, "wide": 3.0, "column": 2.0, "closed": 1.0},
        {"best": 1.0, "wide": 1.0, "column": 0.5, "closed": 0.0},
        table_costs=[TableCost(("best",), 10.0), TableCost(("wide",), 90.0)],
    )
    selection = TopBudget(0.5).select(scores)
    assert selection.gates == {"best": 1.0, "wide": 0.0, "column": 0.5, "closed": 0.0}
    assert selection.features["best"].reason == "rank 1 of 4, the budget pays for 1"
    assert selection.features["column"].reason.endswith("this one adds no bytes")


def test_a_wide_feature_uses_up_the_budget_by_score_and_comes_late_per_cost() -> None:
    scores = scored(
        {"wide": 60.0, "a": 20.0, "b": 10.0, "c": 10.0},
        {"wide": 5.0, "a": 4.0, "b": 3.0, "c": -1.0},
    )
    assert TopBudget(0.5).select(scores).kept == ["wide"]
    assert TopBudget(0.5, order="score_per_cost").select(scores).kept == ["a", "b"]
    assert TopBudget(0.9, order="score_per_cost").select(scores).kept == ["wide", "a", "b"]


@pytest.mark.parametrize(
    ("unit", "amount", "kept"),
    [
        ("bytes", "3072B", ["a", "b"]),
        ("hbm", "3 KiB", ["a", "b"]),
        ("bytes", "2.99KiB", ["a"]),
        ("hbm", "1GiB", ["a", "b", "c"]),
        ("step_ms", "1024ms", ["a"]),
    ],
)
def test_an_amount_is_in_the_unit_of_the_costs(unit: Any, amount: str, kept: list[str]) -> None:
    scores = scored({"a": 1024.0, "b": 2048.0, "c": 4096.0}, {"a": 3.0, "b": 2.0, "c": 1.0})
    assert TopBudget(amount, unit).select(scores).kept == kept


@pytest.mark.parametrize(
    ("unit", "amount", "message"),
    [
        ("bytes", "40GB", r"bytes to keep are '40GB'.*B, KiB, MiB, GiB, TiB"),
        ("bytes", "0GiB", "'0GiB'"),
        ("bytes", "-1GiB", "'-1GiB'"),
        ("step_ms", "3s", "followed by ms"),
        ("features", "16", r"features to keep are '16': give a share of the total in \(0, 1\]$"),
        ("bytes", 0.0, r"share of the cost to keep is 0.0; it must be in \(0, 1\]"),
        ("bytes", 1.5, "is 1.5"),
        ("bytes", math.nan, "is nan"),
        ("ms", 0.5, "unit is 'ms'; the units are features, bytes, hbm, step_ms"),
    ],
)
def test_invalid_budget_is_refused(unit: Any, amount: float | str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TopBudget(amount, unit)


def test_unknown_order_is_refused() -> None:
    with pytest.raises(ValueError, match="order is 'cost'"):
        TopBudget(0.5, order="cost")  # type: ignore[arg-type]


def test_decide_passes_the_costs_to_the_policy_and_missing_costs_are_an_error() -> None:
    scores = scored({}, {"a": 2.0, "b": 1.0})
    with pytest.raises(ValueError, match=r"costs=table_costs\(model, topology, 'hbm'\)"):
        decide(scores, TopBudget(0.5, "hbm"))
    costs = [TableCost(("a",), 1.0), TableCost(("b",), 3.0)]
    assert decide(scores, TopBudget(0.25, "hbm"), costs).kept == ["a"]


def test_costs_of_unknown_features_are_refused() -> None:
    scores = scored({"a": 1.0, "stray": 1.0}, {"a": 2.0})
    with pytest.raises(ValueError, match=r"no score: \['stray'\]"):
        TopBudget(0.5).select(scores)
