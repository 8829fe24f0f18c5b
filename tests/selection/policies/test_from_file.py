"""A selection file is replayed, if it fits the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchrec_fmp.selection.feature_scores import FeatureScores
from torchrec_fmp.selection.policies.from_file import FromFile
from torchrec_fmp.selection.selection import FeatureDecision, Selection

KEPT = FeatureDecision(score=1.5, gate=0.75, kept=True, reason="by hand")
DROPPED = FeatureDecision(score=-3.0, gate=0.0, kept=False, reason="by hand")


def scores(*names: str) -> FeatureScores:
    return FeatureScores(dict.fromkeys(names, 0.0), dict.fromkeys(names, 1.0))


@pytest.fixture
def path(tmp_path: Path) -> str:
    path = str(tmp_path / "selection.json")
    Selection({"a": KEPT, "b": DROPPED}).save(path)
    return path


def test_the_decisions_of_the_file_are_used_in_the_order_of_the_model(path: str) -> None:
    selection = FromFile(path).select(scores("b", "a"))
    assert list(selection.features.items()) == [("b", DROPPED), ("a", KEPT)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a", "b", "c"), r"no decision for \['c'\], .*does not have: \[\]"),
        (("a",), r"no decision for \[\], .*does not have: \['b'\]"),
        (("a", "d"), r"no decision for \['d'\], .*does not have: \['b'\]"),
    ],
)
def test_a_file_for_another_model_is_refused_and_the_features_named(
    path: str, names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=f"selection.json does not fit the model: {message}"):
        FromFile(path).select(scores(*names))


def test_a_missing_file_is_named_before_the_job_starts(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent.json"):
        FromFile(str(tmp_path / "absent.json"))
