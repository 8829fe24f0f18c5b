"""Selections: JSON that a person can read, edit and feed back in."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_fmp.selection.selection import FeatureDecision, Selection

KEPT = FeatureDecision(score=1.5, gate=0.75, kept=True, reason="gate open")
DROPPED = FeatureDecision(score=-3.0, gate=0.0, kept=False, reason="gate closed")
SELECTION = Selection({"b": KEPT, "a": DROPPED, "c": replace(KEPT, gate=1.0)})

finite = st.floats(allow_nan=False, allow_infinity=False)
gates = st.floats(0, 1, exclude_min=True)
confidences = st.none() | st.floats(0, 1)
decisions = st.one_of(
    st.builds(FeatureDecision, finite, gates, st.just(True), st.text(), confidences),
    st.builds(FeatureDecision, finite, st.just(0.0), st.just(False), st.text(), confidences),
)
selections = st.builds(Selection, st.dictionaries(st.text(), decisions))


def test_views_keep_the_models_order() -> None:
    assert SELECTION.kept == ["b", "c"]
    assert SELECTION.dropped == ["a"]
    assert SELECTION.gates == {"b": 0.75, "a": 0.0, "c": 1.0}


@given(selections)
def test_json_round_trip_preserves_the_selection_and_its_order(selection: Selection) -> None:
    again = Selection.from_json(selection.to_json())
    assert again == selection
    assert list(again.features) == list(selection.features)
    assert again.digest() == selection.digest()


@given(selections, selections)
def test_digests_differ_if_and_only_if_selections_differ(
    first: Selection, second: Selection
) -> None:
    assert (first.digest() == second.digest()) == (first.to_json() == second.to_json())


def test_the_digest_is_the_same_on_every_machine() -> None:
    assert SELECTION.digest() == "f656a7c754ce04b8b68510998df61eda"


def test_a_saved_selection_loads(tmp_path: Path) -> None:
    path = str(tmp_path / "selection.json")
    SELECTION.save(path)
    assert Selection.load(path) == SELECTION


def test_a_file_may_leave_the_confidence_out() -> None:
    content = json.loads(SELECTION.to_json())
    for decision in content.values():
        del decision["confidence"]
    assert Selection.from_json(json.dumps(content)) == SELECTION


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent.json"):
        Selection.load(str(tmp_path / "absent.json"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": 1.5}, r"gate is 1.5; it must be in \[0, 1\]"),
        ({"gate": float("nan")}, r"gate is nan"),
        ({"gate": 0.0}, "a kept feature needs a gate above 0"),
        ({"kept": False}, "a dropped feature needs gate 0"),
        ({"gate": "open"}, "not supported"),
        ({"confidence": 1.5}, r"confidence is 1.5; it must be in \[0, 1\]"),
        ({"kpet": True}, "kpet"),
    ],
)
def test_a_bad_decision_names_file_feature_and_value(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "edited.json"
    content = json.loads(SELECTION.to_json())
    content["c"].update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"edited.json, feature 'c': .*{message}"):
        Selection.load(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "edited.json cannot be read: .*line 1"),
        ("[]", "edited.json: expected one JSON object"),
        ('{"a": 1}', "edited.json, feature 'a'"),
        ('{"a": {"score": 1.0}}', "edited.json, feature 'a': .*'gate', 'kept', and 'reason'"),
    ],
)
def test_the_error_for_an_invalid_selection_names_the_file(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "edited.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Selection.load(str(path))


def test_a_feature_with_two_decisions_is_refused() -> None:
    members = [f'"a": {json.dumps(asdict(decision))}' for decision in (KEPT, DROPPED)]
    with pytest.raises(ValueError, match="selection cannot be read: 'a' is given twice"):
        Selection.from_json(f"{{{', '.join(members)}}}")


def test_features_can_be_dropped_by_name() -> None:
    selection = Selection.dropping(["b", "a"], reason="stale")
    assert (selection.kept, selection.dropped) == ([], ["b", "a"])
    assert selection.gates == {"b": 0.0, "a": 0.0}
    assert {decision.reason for decision in selection.features.values()} == {"stale"}
