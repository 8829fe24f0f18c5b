"""Lines of metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from torchrec_fmp.loggers.jsonl import MetricsLog


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_holds_the_mean_loss_since_the_last_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(str(path), interval=2)
    for step, loss in enumerate([1.0, 3.0, 5.0, 9.0]):
        log.step("pretrain", step, loss, samples=10 * (step + 1))
    assert lines(path) == [
        {"phase": "pretrain", "step": 2, "samples": 20, "loss": 2.0},
        {"phase": "pretrain", "step": 4, "samples": 40, "loss": 7.0},
    ]


def test_no_line_mixes_phases_and_no_step_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(str(path), interval=2)
    for step, loss in enumerate([1.0, 1.0, 4.0]):
        log.step("pretrain", step, loss, samples=step + 1)
    log.flush()
    for step, loss in enumerate([7.0, 9.0]):
        log.step("continue", step, loss, samples=step + 1)
    log.flush()
    assert [(line["phase"], line["step"], line["loss"]) for line in lines(path)] == [
        ("pretrain", 2, 1.0),
        ("pretrain", 3, 4.0),
        ("continue", 2, 8.0),
    ]


def test_without_a_path_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = MetricsLog(None, interval=1)
    log.step("pretrain", 0, 1.0, samples=1)
    log.flush()
    assert not list(tmp_path.iterdir())


def test_an_interval_below_one_step_is_refused() -> None:
    with pytest.raises(ValueError, match="interval is 0 steps; it must be at least 1"):
        MetricsLog(None, interval=0)
