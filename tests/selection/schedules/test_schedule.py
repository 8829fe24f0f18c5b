"""The features that each prune of a schedule keeps."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_fmp.selection.costs import TableCost
from torchrec_fmp.selection.feature_scores import FeatureScores
from torchrec_fmp.selection.policies.closed_gates import ClosedGates
from torchrec_fmp.selection.policies.policy import Policy, decide
from torchrec_fmp.selection.policies.top_budget import TopBudget
from torchrec_fmp.selection.policies.top_fraction import TopFraction
from torchrec_fmp.selection.schedules.gradual import Gradual
from torchrec_fmp.selection.schedules.one_shot import OneShot
from torchrec_fmp.selection.schedules.schedule import decide_prune
from torchrec_fmp.selection.selection import Selection

NAMES = [f"f{i}" for i in range(12)]
TABLES = [TableCost((name,), 1.0 + i) for i, name in enumerate(NAMES)]

values = st.lists(st.floats(-5, 5), min_size=12, max_size=12)
gates = st.lists(st.sampled_from([0.0, 0.2, 0.7, 1.0]), min_size=12, max_size=12)
rounds = st.lists(st.tuples(values, gates), min_size=4, max_size=4)
policies = st.one_of(
    st.floats(0.05, 1).map(TopFraction),
    st.just(ClosedGates()),
    st.tuples(st.floats(0.05, 1), st.sampled_from(["score", "score_per_cost"])).map(
        lambda it: TopBudget(it[0], "bytes", it[1])
    ),
)


def scores_of(names: list[str], drawn: tuple[list[float], list[float]]) -> FeatureScores:
    """Scores of the remaining features; one collection has the first half of all features."""
    score, gate = (dict(zip(NAMES, some, strict=True)) for some in drawn)
    collections = {"ebc": [name for name in names if name in NAMES[:6]]}
    return FeatureScores({n: score[n] for n in names}, {n: gate[n] for n in names}, collections)


def selections(policy: Policy, prunes: int, drawn: list[tuple[list[float], list[float]]]) -> list:
    """(scores, selection) of each prune."""
    earlier: Selection | None = None
    found = []
    for number in range(1, prunes + 1):
        scores = scores_of(NAMES if earlier is None else earlier.kept, drawn[number - 1])
        costs = TABLES if policy.cost_unit else None
        earlier = decide_prune(
            scores, policy, Gradual(prunes), number, earlier=earlier, costs=costs
        )
        found.append((scores, earlier))
    return found


@settings(max_examples=100, deadline=None)
@given(policies, st.integers(1, 4), rounds)
def test_dropped_features_stay_dropped_with_their_original_decision(
    policy: Policy, prunes: int, drawn: list[tuple[list[float], list[float]]]
) -> None:
    gone: dict[str, object] = {}
    for scores, selection in selections(policy, prunes, drawn):
        assert list(selection.features) == NAMES
        assert set(scores.scores).isdisjoint(gone)
        for name, decision in gone.items():
            assert selection.features[name] == decision
        gone = {name: selection.features[name] for name in selection.dropped}
        assert any(name in selection.kept for name in NAMES[:6])


@settings(max_examples=100, deadline=None)
@given(policies, rounds, st.lists(st.floats(0, 1), min_size=12, max_size=12))
def test_every_prune_records_the_confidence_in_its_decisions(
    policy: Policy,
    drawn: list[tuple[list[float], list[float]]],
    shares: list[float],
) -> None:
    confidence = dict(zip(NAMES, shares, strict=True))
    scores = replace(scores_of(NAMES, drawn[0]), confidence=confidence)
    costs = TABLES if policy.cost_unit else None
    for prunes in (1, 2):
        selection = decide_prune(scores, policy, Gradual(prunes), 1, costs=costs)
        assert {name: d.confidence for name, d in selection.features.items()} == confidence


@settings(max_examples=100, deadline=None)
@given(policies, st.integers(2, 4), rounds)
def test_a_prune_before_the_last_keeps_the_policys_features_and_the_best_of_the_rest(
    policy: Policy, prunes: int, drawn: list[tuple[list[float], list[float]]]
) -> None:
    scores, selection = selections(policy, prunes, drawn)[0]
    costs = TABLES if policy.cost_unit else None
    wanted = decide(scores, policy, costs).kept
    assert set(wanted) <= set(selection.kept)
    path = 12 * (len(wanted) / 12) ** (1 / prunes)
    assert len(selection.kept) == math.ceil(path - 1e-9)
    rest = {name: scores.scores[name] for name in NAMES if name not in wanted}
    taken = [score for name, score in rest.items() if name in selection.kept]
    left = [score for name, score in rest.items() if name not in selection.kept]
    assert min(taken, default=math.inf) >= max(left, default=-math.inf)
    for name in selection.kept:
        assert selection.features[name].gate == (scores.gates[name] or 1.0)


@settings(max_examples=50, deadline=None)
@given(st.floats(0.05, 1), st.integers(1, 4), rounds)
def test_the_last_prune_keeps_the_policys_share_of_all_features(
    fraction: float, prunes: int, drawn: list[tuple[list[float], list[float]]]
) -> None:
    scores, selection = selections(TopFraction(fraction), prunes, drawn)[-1]
    # The collection may need one more feature, as in a single prune.
    count = max(1, round(12 * fraction))
    assert len(selection.kept) in (count, count + 1)
    ranked = sorted(scores.scores, key=lambda name: -scores.scores[name])
    assert set(ranked[:count]) <= set(selection.kept)


@settings(max_examples=50, deadline=None)
@given(policies, rounds)
def test_one_shot_is_the_policys_decision(
    policy: Policy, drawn: list[tuple[list[float], list[float]]]
) -> None:
    scores, costs = scores_of(NAMES, drawn[0]), TABLES if policy.cost_unit else None
    assert decide_prune(scores, policy, OneShot(), 1, costs=costs) == decide(scores, policy, costs)


def test_closed_gates_decide_only_on_the_remaining_features() -> None:
    scores = FeatureScores({"a": 2.0, "c": -3.0}, {"a": 1.0, "c": 0.0})
    first = FeatureScores({"a": 2.0, "b": -9.0, "c": -3.0}, {"a": 1.0, "b": 0.0, "c": 0.0})
    earlier = decide_prune(first, ClosedGates(), Gradual(2), 1)
    # 3 * (1 / 3) ** (1 / 2) = 1.7
    assert earlier.kept == ["a", "c"]
    # Closed, but kept for now: it is opened.
    assert earlier.features["c"].gate == 1.0
    assert earlier.features["c"].reason == "prune 1 of 2, rank 2, 2 stay"
    last = decide_prune(scores, ClosedGates(), Gradual(2), 2, earlier=earlier)
    assert last.kept == ["a"]
    assert last.features["b"] == earlier.features["b"]


def test_a_budget_is_a_share_of_the_full_models_cost() -> None:
    # Half of all costs is 39. The last prune's features cost 4 + 5 + ... + 12 = 72, half is 36.
    drawn = ([float(i) for i in range(12)], [1.0] * 12)
    budget = TopBudget(38 / 78, "bytes")
    gone = Selection.dropping(NAMES[:3]).features
    first = decide_prune(scores_of(NAMES, drawn), TopFraction(1.0), OneShot(), 1)
    earlier = Selection({**first.features, **gone})
    last = decide_prune(
        scores_of(earlier.kept, drawn), budget, Gradual(2), 2, earlier=earlier, costs=TABLES
    )
    # 12 + 11 + 10 = 33, and one feature for the collection; 9 more would be 42.
    assert last.kept == ["f5", "f9", "f10", "f11"]


@given(st.floats(0.01, 1), st.integers(1, 6))
def test_gradual_prunes_keep_the_same_share_each_time_and_the_requested_share_in_the_end(
    keep: float, prunes: int
) -> None:
    shares = [Gradual(prunes).share(number, keep) for number in range(1, prunes + 1)]
    assert shares[-1] == keep
    for before, after in zip([1.0, *shares], shares, strict=False):
        assert after / before == pytest.approx(keep ** (1 / prunes))


@pytest.mark.parametrize("prunes", [0, -1])
def test_a_schedule_without_prunes_is_refused(prunes: int) -> None:
    with pytest.raises(ValueError, match=f"number of prunes is {prunes}; it must be at least 1"):
        Gradual(prunes)
