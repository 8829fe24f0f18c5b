"""The report that a run ends with."""

from __future__ import annotations

import math
from typing import Any

import pytest

from torchrec_fmp.data.dataset import PlantedTruth
from torchrec_fmp.report.text import format_report

TRUTH = PlantedTruth(signal=("main_0", "main_1"), redundant=("copy_0",), noise=("noise_0",))


def result(**changes: Any) -> dict[str, Any]:
    figures = {"auc": 0.75, "logloss": 0.5, "ne": 0.9}
    return {
        "features_total": 4,
        "features_kept": 2,
        "kept": ["main_0", "noise_0"],
        "dropped": ["main_1", "copy_0"],
        "metrics": {"full": figures, "pruned": {**figures, "auc": 0.7}, "final": figures},
        "bytes": {"before": 1000, "after": 250},
        "parameters": {"before": 5_000, "after": 1_000},
        "step_ms": {"full": 2.0, "gated": 1.25, "pruned": 1.0},
        "seconds": {"full": 3.0, "pretrain": 1.5, "prune": 0.1, "continue": 2.0},
        "samples": {"pretrain": 1500, "continue": 10_000},
        "replaced": [],
        "parity_max_abs": 2.4e-7,
    } | changes


def line(report: str, start: str) -> list[str]:
    """The words of the report's only line that begins with `start`."""
    (found,) = [text for text in report.splitlines() if text.strip().startswith(start)]
    return found.split()


def test_features_are_compared_with_the_planted_truth() -> None:
    report = format_report(result(), TRUTH, "runs/a")
    assert line(report, "features") == ["features", "2", "of", "4", "kept"]
    assert line(report, "dropped") == ["dropped", "main_1,", "copy_0"]
    assert line(report, "signal") == ["signal", "1", "of", "2", "main_1"]
    assert line(report, "noise") == ["noise", "1", "of", "1", "noise_0"]
    assert line(report, "redundant")[:4] == ["redundant", "0", "of", "1"]
    assert line(report, "written") == ["written", "runs/a"]


def test_metrics_sizes_and_speed_stand_side_by_side() -> None:
    report = format_report(result(), None, "runs/a")
    assert line(report, "pruned, before")[-3:] == ["0.7000", "0.5000", "0.9000"]
    assert line(report, "full model, trained")[-3:] == ["0.7500", "0.5000", "0.9000"]
    assert line(report, "parameters") == ["parameters", "5,000", "1,000", "0.20"]
    assert line(report, "table bytes")[2:] == ["1,000", "250", "0.25"]
    assert line(report, "step, ms")[2:] == ["2.00", "1.00", "0.50"]
    assert line(report, "rows") == ["rows", "pretrain", "1,500,", "continue", "10,000"]
    assert line(report, "parity")[1] == "2.4e-07"
    assert "planted" not in report


def test_a_figure_missing_without_a_reference_is_a_dash() -> None:
    changes = {
        "metrics": {**result()["metrics"], "full": None},
        "step_ms": {"full": None, "gated": 1.25, "pruned": 1.0},
        "seconds": {"full": None, "pretrain": 1.5, "prune": 0.1, "continue": 2.0},
    }
    report = format_report(result(**changes), None, "runs/a")
    assert "full model, trained" not in report
    assert line(report, "step, ms")[2:] == ["-", "1.00", "-"]
    assert line(report, "seconds")[1:3] == ["full", "-,"]


@pytest.mark.parametrize("missing", [None, math.nan])
def test_a_metric_without_a_value_is_a_dash(missing: float | None) -> None:
    final = {"auc": missing, "logloss": 0.5, "ne": missing}
    metrics = {**result()["metrics"], "final": final}
    report = format_report(result(metrics=metrics), None, "runs/a")
    assert line(report, "final") == ["final", "-", "0.5000", "-"]


def test_replaced_values_are_counted_by_column_and_problem() -> None:
    replaced = [{"column": "a", "problem": "negative id", "count": 7}]
    report = format_report(result(replaced=replaced), None, "runs/a")
    assert line(report, "replaced") == ["replaced", "7", "x", "a:", "negative", "id"]


def test_a_prune_that_drops_nothing_says_so() -> None:
    report = format_report(result(dropped=[], features_kept=4), None, "runs/a")
    assert line(report, "dropped") == ["dropped", "none"]
