"""The `plan` verb: what-ifs of described models, and dry runs of a job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_run import tiny, write_config
from torchrec_fmp.cli.__main__ import main
from torchrec_fmp.planning.what_if import WhatIf
from torchrec_fmp.report.plan import format_bytes
from torchrec_fmp.run.what_if_config import load_what_if
from torchrec_fmp.run.what_if_request import Request, run

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = ["--table_fraction", "0.03", "--topology.world_size", "16"]


@pytest.mark.parametrize("name", ["what_if_128", "what_if_1024"])
def test_the_shipped_configs_have_a_thousand_tables_and_a_trillion_parameters(name: str) -> None:
    config = load_what_if(str(CONFIGS / f"{name}.yaml"))
    assert sum(group.count for group in config.groups.values()) == 1000
    elements = [group.count * group.rows * group.dim for group in config.groups.values()]
    assert sum(elements) == 10**12
    assert name == f"what_if_{config.topology.world_size}"


@pytest.mark.parametrize("name", ["what_if_128", "what_if_1024"])
@pytest.mark.parametrize("search", ["by_time", "greedy"])
def test_the_shipped_configs_plan_at_reduced_size(
    name: str, search: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.json"
    arguments = ["plan", str(CONFIGS / f"{name}.yaml"), "--keep-fraction", "0.5"]
    types = ["--planner.sharding_types", "[table_wise, row_wise]"]
    status = main([*arguments, "--json", str(out), *SMALL, "--planner.search", search, *types])
    assert status == 0
    figures = json.loads(out.read_text())
    before, after = figures["size_before"], figures["size_after"]
    # Half of 1, 1, 2, 3, 3, 6 and 15 features, rounded up.
    assert (before["features"], after["features"]) == (31, 1 + 1 + 1 + 2 + 2 + 3 + 8)
    assert after["bytes"] == 4 * after["parameters"] < before["bytes"]
    for column in ("before", "sticky", "planner"):
        least, median, most = figures[column]["rank_bytes"]
        assert 0 <= least <= median <= most <= 80 * 2**30
    assert figures["sticky"]["moved_bytes"] == 0
    assert figures["sticky"]["step_ms"] <= figures["before"]["step_ms"]
    moving = figures["planner"]
    link, rank, moved = (
        moving[name] for name in ("busiest_link_bytes", "busiest_rank_bytes", "moved_bytes")
    )
    assert 0 <= link <= rank <= moved
    assert moved <= (4 + 4 / 64) * after["parameters"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == "16 ranks before after, tables stay after, new plan".split()
    numbers = [line for line in printed[1:] if line and not line.startswith(("tables stay", "new"))]
    assert len({len(line) for line in numbers}) == 1, "numbers are not right-aligned"


def small_what_if(*overrides: str) -> WhatIf:
    path = str(CONFIGS / "what_if_1024.yaml")
    return run(Request(path, keep_fraction=0.5, overrides=[*SMALL, *overrides]))


def test_search_by_time_is_within_a_tenth_of_greedy_search_by_torchrecs_estimate() -> None:
    types = ["--planner.sharding_types", "[table_wise, table_row_wise]"]
    by_time, greedy = (
        small_what_if("--planner.search", search, *types) for search in ("by_time", "greedy")
    )
    assert by_time.before.step_ms <= 1.1 * greedy.before.step_ms
    assert by_time.planner is not None and greedy.planner is not None
    assert by_time.planner.step_ms <= 1.1 * greedy.planner.step_ms


def test_keeping_half_the_features_shortens_the_step_if_ranks_outnumber_tables() -> None:
    found = small_what_if("--topology.world_size", "64")
    assert found.size_before.tables < found.world_size
    assert found.planner is not None
    assert found.planner.step_ms < 0.7 * found.before.step_ms
    assert found.comparison.decision == "planner"


def what_if_file(directory: Path, **groups: Any) -> str:
    return write_config(
        directory, {"groups": groups, "topology": {"world_size": 2}, "batch_size": 64}
    )


ADS = {"count": 2, "rows": 1000, "dim": 16, "features_per_table": 2}


def test_a_table_is_dropped_with_its_last_feature(tmp_path: Path) -> None:
    path = what_if_file(tmp_path, ads=ADS)
    one = run(Request(path, drop=["ads_0_0"]))
    assert (one.size_after.features, one.size_after.tables) == (3, 2)
    both = run(Request(path, drop=["ads_0_0", "ads_0_1"]))
    assert (both.size_after.features, both.size_after.tables) == (2, 1)
    assert both.size_after.bytes == 4 * 1000 * 16


def test_a_model_that_does_not_fit_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = what_if_file(tmp_path, ads=ADS)
    assert main(["plan", path, "--drop", "ads_0_0", "--topology.hbm_gib", "0.00001"]) == 1
    assert "TorchRec's planner finds no plan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--drop", "ad_0_0"], "no feature 'ad_0_0'. Did you mean 'ads_0_0'?"),
        ([], "nothing is dropped"),
        (["--keep-fraction", "0"], "keep-fraction is 0.0; it must be in"),
        (["--drop", "ads_0_0", "--topology.world_sise", "4"], "Did you mean 'topology.world_size'"),
        (["--drop", "ads_0_0", "--topology.local_world_size", "3"], "must divide the world_size 2"),
        (["--drop", "ads_0_0", "--planner.sharding_types", "[row]"], "TorchRec has"),
    ],
)
def test_invalid_arguments_are_refused_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["plan", what_if_file(tmp_path, ads=ADS), *arguments]) in (1, 2)
    assert message in capsys.readouterr().err


def test_a_misspelt_option_of_a_group_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = what_if_file(tmp_path, ads={**ADS, "row": 5})
    assert main(["plan", path, "--drop", "ads_0_0"]) == 2
    assert "row" in capsys.readouterr().err


def test_a_dry_run_of_a_job_reports_the_effect_of_a_selection(tmp_path: Path) -> None:
    path = write_config(tmp_path, tiny())
    names = sorted(name for name in _sparse(path))
    found = run(Request(path, drop=names[:2], overrides=["--topology.device", "cpu"]))
    assert found.memory == "ddr"
    assert found.size_after.features == found.size_before.features - 2
    assert found.size_after.bytes < found.size_before.bytes
    assert found.sticky.rank_bytes[2] < found.before.rank_bytes[2]
    on_four = run(
        Request(
            path, drop=names[:2], overrides=["--topology.device=cpu", "--topology.world_size=4"]
        )
    )
    assert on_four.world_size == 4


def _sparse(path: str) -> tuple[str, ...]:
    from torchrec_fmp.run.config import load_config

    return tuple(load_config(path)[0].data.schema.sparse_names)


def test_bytes_have_binary_units() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1024, 3 * 2**40)] == [
        "0 B",
        "1,023 B",
        "1.0 KiB",
        "3.0 TiB",
    ]
