"""The result of a what-if: a table for people, JSON for machines."""

from __future__ import annotations

import json
import math

from torchrec_fmp import paths
from torchrec_fmp.planning.what_if import PlanFigures, WhatIf


def write_json(result: WhatIf, path: str) -> None:
    """Writes the whole result, for machines."""
    with paths.write_atomically(path) as file:
        file.write(json.dumps(result.describe(), indent=2) + "\n")


def format_what_if(result: WhatIf) -> str:
    """The result as a table for people."""
    before, after = result.size_before, result.size_after
    memory = result.memory.upper()
    columns = (result.before, result.sticky, result.planner)
    sizes = (before, after, after)
    rows = [
        ("features", [f"{size.features:,}" for size in sizes]),
        ("tables", [f"{size.tables:,}" for size in sizes]),
        ("parameters", [f"{size.parameters:,}" for size in sizes]),
        ("table bytes", [format_bytes(size.bytes) for size in sizes]),
        *[
            (f"{memory} of a rank, {name}", [_of(c, position) for c in columns])
            for position, name in enumerate(("least", "median", "most"))
        ],
        ("step, ms (estimate)", [f"{c.step_ms:,.3f}" if c else "-" for c in columns]),
        (
            "planner, s",
            [
                f"{c.planner_seconds:,.1f}" if c and c.planner_seconds is not None else "-"
                for c in columns
            ],
        ),
    ]
    for name, attribute in (
        ("bytes to move", "moved_bytes"),
        ("  busiest rank", "busiest_rank_bytes"),
        ("  busiest link", "busiest_link_bytes"),
    ):
        moved = [format_bytes(getattr(c, attribute)) if c else "-" for c in columns[1:]]
        rows.append((name, ["", *moved]))
    compared = result.comparison
    times = [
        "-" if ms is None else f"{ms:,.1f}"
        for ms in (compared.sticky_move_ms, compared.planner_move_ms)
    ]
    rows.append(("move, ms (estimate)", ["", *times]))
    ranks = f"{result.world_size:,} rank" + "s" * (result.world_size > 1)
    header = (ranks, ["before", "after, tables stay", "after, new plan"])
    lines = [f"{name:<24}" + "".join(f"{c:>20}" for c in cells) for name, cells in [header, *rows]]
    choice = {"sticky": "tables stay", "planner": "new plan"}[compared.decision]
    return "\n".join([*lines, "", f"{choice}: {compared.reason}"]) + "\n"


def format_bytes(count: int) -> str:
    """The count with a binary unit, such as 3.6 TiB."""
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    power = min(int(math.log2(count) // 10), len(units) - 1) if count else 0
    return f"{count:,} B" if not power else f"{count / 1024**power:,.1f} {units[power]}"


def _of(figures: PlanFigures | None, position: int) -> str:
    return format_bytes(figures.rank_bytes[position]) if figures else "-"
