"""`decide` never leaves an embedding collection empty."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from torchrec_fmp.selection.feature_scores import FeatureScores
from torchrec_fmp.selection.policies.closed_gates import ClosedGates
from torchrec_fmp.selection.policies.policy import decide


def test_the_best_feature_of_an_otherwise_empty_collection_is_kept_fully_open() -> None:
    scores = FeatureScores(
        scores={"a": -3.0, "b": -2.5, "c": 1.0, "d": -4.0, "x": -3.0},
        gates={"a": 0.0, "b": 0.0, "c": 0.6, "d": 0.0, "x": 0.0},
        collections={"first": ["a", "b"], "second": ["c", "d"]},
    )
    selection = decide(scores, ClosedGates())
    assert selection.gates == {"a": 0.0, "b": 1.0, "c": 0.6, "d": 0.0, "x": 0.0}
    assert selection.features["b"].reason == ("best of first, which would be empty; opened from 0")
    assert list(selection.features) == ["a", "b", "c", "d", "x"]


@given(st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=4, max_size=4))
def test_a_policys_selection_changes_only_where_a_collection_would_be_empty(
    gates: list[float],
) -> None:
    names = "abcd"
    scores = FeatureScores(
        dict(zip(names, [1.0, 2.0, 3.0, 4.0], strict=True)),
        dict(zip(names, gates, strict=True)),
        {"first": "ab", "second": "cd"},
    )
    chosen = ClosedGates().select(scores)
    decided = decide(scores, ClosedGates())
    for collection, best in (("ab", "b"), ("cd", "d")):
        if any(name in chosen.kept for name in collection):
            assert all(decided.features[n] == chosen.features[n] for n in collection)
        else:
            assert [name for name in collection if name in decided.kept] == [best]
