"""The table at the end of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torchrec_fmp.data.dataset import PlantedTruth

# Names of the models in reports, in order.
MODEL_NAMES = {
    "full": "full model, trained without gates",
    "pruned": "pruned, before continued training",
    "final": "final",
}


def format_report(result: Mapping[str, Any], truth: PlantedTruth | None, directory: str) -> str:
    """The output of `result_of` as a table for people."""
    lines = [
        f"features   {result['features_kept']} of {result['features_total']} kept",
        f"  dropped  {', '.join(result['dropped']) or 'none'}",
    ]
    if truth is not None:
        lines += ["", *_truth_lines(result, truth)]
    lines += ["", *_metric_lines(result["metrics"]), "", *_size_lines(result)]
    samples, seconds = result["samples"].items(), result["seconds"].items()
    lines += [
        "",
        "rows       " + ", ".join(f"{phase} {rows:,}" for phase, rows in samples),
        "seconds    " + ", ".join(f"{phase} {format_number(s, '.1f')}" for phase, s in seconds),
    ]
    lines.append(f"parity     {format_number(result['parity_max_abs'], '.1e')} largest difference")
    for entry in result["replaced"]:
        lines.append(f"replaced   {entry['count']} x {entry['column']}: {entry['problem']}")
    lines.append(f"written    {directory}")
    return "\n".join(lines) + "\n"


def _truth_lines(result: Mapping[str, Any], truth: PlantedTruth) -> list[str]:
    kept = set(result["kept"])
    lines = ["planted     kept          wrong"]
    for kind, names, should_stay in (
        ("signal", truth.signal, True),
        ("redundant", truth.redundant, None),
        ("noise", truth.noise, False),
    ):
        staying = [name for name in names if name in kept]
        wrong = [n for n in names if should_stay is not None and (n in kept) != should_stay]
        verdict = "(either way is right)" if should_stay is None else ", ".join(wrong) or "none"
        lines.append(f"  {kind:<9} {len(staying):>3} of {len(names):<6} {verdict}")
    return lines


def _metric_lines(metrics: Mapping[str, Any]) -> list[str]:
    lines = [f"{'test split':<35} {'AUC':>8} {'logloss':>8} {'NE':>8}"]
    for key, name in MODEL_NAMES.items():
        figures = metrics[key]
        if figures is not None:
            row = " ".join(
                f"{format_number(figures[m], '.4f'):>8}" for m in ("auc", "logloss", "ne")
            )
            lines.append(f"  {name:<33} {row}")
    return lines


def _size_lines(result: Mapping[str, Any]) -> list[str]:
    step = result["step_ms"]
    rows = [
        ("parameters", result["parameters"]["before"], result["parameters"]["after"], ",.0f"),
        ("table bytes", result["bytes"]["before"], result["bytes"]["after"], ",.0f"),
        ("step, ms", step["full"], step["pruned"], ".2f"),
    ]
    lines = [f"{'size and speed':<15} {'before':>14} {'after':>14} {'ratio':>7}"]
    for name, before, after, style in rows:
        ratio = after / before if before else math.nan
        lines.append(
            f"  {name:<13} {format_number(before, style):>14} {format_number(after, style):>14} "
            f"{format_number(ratio, '.2f'):>7}"
        )
    return lines


def format_number(value: float | None, style: str) -> str:
    """The value in a style of `format`, or `-` where it was not measured."""
    return "-" if value is None or math.isnan(value) else format(value, style)
