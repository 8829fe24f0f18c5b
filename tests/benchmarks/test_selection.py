"""The comparison of feature selectors: its grid of processes, and the figures of its report."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.selection_grid import grid, settings
from benchmarks.selection_grid.cell import FULL, Cell
from benchmarks.selection_grid.data import planted, prepare_planted, prepare_real
from benchmarks.selection_grid.figures import Estimate, area, jaccard, paired, spearman
from benchmarks.selection_grid.report import report
from tests.support.tiny_run import TINY

DATA = Path(__file__).parents[3] / "shared" / "data"
CONFIG = {
    # Its dropout and batch norm add state that a scoring leaves behind.
    "model": {"class_path": "MlpBackbone", "init_args": {"embedding_dim": 8, "layers": [16]}},
    "pretrain": TINY["pretrain"],
    "train": TINY["train"],
}
SCORERS = {
    "gates": {"scorer": TINY["scorer"]},
    "free gates": {"scorer": {"class_path": "HardConcreteScorer"}},
    "broken": {"scorer": {"class_path": "NoSuchScorer"}},
}
FRACTIONS = (0.75, 0.5)
# Number of rows of the real data; the last tenth is the test split.
ROWS = 60_000


@pytest.fixture(scope="module")
def tiny_grid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[Cell]]]:
    """Directory of results, and cells of two seeds; one scores for its last fraction only."""
    directory = tmp_path_factory.mktemp("grid")
    prepared = prepare_planted("tiny", TINY["data"]["init_args"], directory / "data")
    cells = grid.cells_of("tiny", prepared, CONFIG, "mlp", SCORERS, range(2), FRACTIONS)
    (scored,) = (cell for cell in cells if (cell.scorer, cell.seed) == ("gates", 1))
    yield directory, [*cells, replace(scored, scorer="one fraction", fractions=FRACTIONS[1:])]


@pytest.mark.slow
def test_a_grid_continues_after_a_failing_cell_and_does_not_repeat_finished_cells(
    tiny_grid: tuple[Path, list[Cell]],
) -> None:
    directory, cells = tiny_grid
    failed = grid.run(cells, directory, jobs=2, commit="c0ffee")
    assert sorted(failed) == ["tiny-mlp-broken-0", "tiny-mlp-broken-1"]
    assert all("NoSuchScorer" in text for text in failed.values())

    rows = pq.read_table(directory / "selection.parquet").to_pylist()
    check_rows(rows)
    check_restored(rows)
    assert "| gates |" in report(rows)

    files = {path: path.stat().st_mtime_ns for path in directory.glob("rows/*.json")}
    assert len(files) == len(cells) - len(failed)
    lines: list[str] = []
    assert (
        grid.run(cells, directory, jobs=2, commit="c0ffee", say=lines.append).keys()
        == failed.keys()
    )
    assert lines[0] == f"{len(files)} of {len(cells)} cells are finished"
    assert files == {path: path.stat().st_mtime_ns for path in directory.glob("rows/*.json")}
    assert pq.read_table(directory / "selection.parquet").to_pylist() == rows

    # The merged rows alone are enough to know the finished cells.
    shutil.rmtree(directory / "rows")
    lines.clear()
    assert (
        grid.run(cells, directory, jobs=2, commit="c0ffee", say=lines.append).keys()
        == failed.keys()
    )
    assert lines[0] == f"{len(files)} of {len(cells)} cells are finished"
    assert pq.read_table(directory / "selection.parquet").to_pylist() == rows


def check_rows(rows: list[dict[str, Any]]) -> None:
    found = {(row["scorer"], row["seed"], row["fraction"]): row for row in rows}
    assert found.keys() == {
        ("one fraction", 1, 0.5),
        *((FULL, seed, 1.0) for seed in range(2)),
        *(
            (name, seed, k)
            for name in ("gates", "free gates")
            for seed in range(2)
            for k in FRACTIONS
        ),
    }
    for (scorer, _, fraction), row in found.items():
        assert row["features_kept"] == round(fraction * row["features_total"])
        assert row["table_bytes_before"] == found[FULL, 0, 1.0]["table_bytes_before"]
        assert row["auc"] > 0.85
        if scorer == FULL:
            assert row["continue_samples"] == 10_000
            assert row["signal_recall"] == 1
            continue
        assert row["table_bytes_after"] < row["table_bytes_before"]
        # Whole batches of 32, then of 100.
        assert (row["selection_samples"], row["continue_samples"]) == (4992, 5000)
        assert row["selection_forwards"] == row["selection_samples"]
        assert min(row[f"{phase}_seconds"] for phase in ("selection", "prune", "continue")) > 0
        assert row["parity_max_abs"] <= 1e-5
    # Three signals and four noise features: the best four hold every signal.
    at_half = found["gates", 0, 0.5]
    assert (at_half["signal_recall"], at_half["signal_precision"]) == (1, 3 / 4)
    assert at_half["noise_dropped"] == 3 / 4


def check_restored(rows: list[dict[str, Any]]) -> None:
    """The second fraction of a scoring is bit-equal to a scoring for this fraction alone."""
    last = [row for row in rows if (row["seed"], row["fraction"]) == (1, FRACTIONS[1])]
    restored, scored = (
        next(row for row in last if row["scorer"] == name) for name in ("gates", "one fraction")
    )
    names = ["kept", "scores", "parity_max_abs"]
    names += [f"{when}{name}" for when in ("pruned_", "") for name in ("auc", "logloss", "ne")]
    assert {name: restored[name] for name in names} == {name: scored[name] for name in names}


def test_a_cell_is_stale_if_its_settings_have_changed(tiny_grid: tuple[Path, list[Cell]]) -> None:
    _, (_, cell, *_) = tiny_grid
    assert replace(cell, seed=7, prepared=Path("elsewhere")).digest == cell.digest
    assert replace(cell, fractions=(0.5,)).digest != cell.digest
    config = {**cell.config, "train": {"batch_size": 7}}
    assert replace(cell, config=config).digest != cell.digest


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets are not at ../shared/data")
def test_a_slice_of_real_data_goes_through_every_phase(tmp_path: Path) -> None:
    cells = []
    for name in settings.REAL:
        raw = tmp_path / f"{name}.parquet"
        table = pq.read_table(DATA / f"{name}.parquet").slice(0, ROWS).drop_columns(["is_test"])
        is_test = pa.array([int(10 * row >= 9 * ROWS) for row in range(ROWS)], pa.int8())
        pq.write_table(table.append_column("is_test", is_test), raw)
        config = settings.shared_config(name, settings.BACKBONES["dlrm"])
        scorers = {"gates": settings.sections("hard_concrete")}
        prepared = prepare_real(raw, tmp_path / "data")
        cells.append(grid.cells_of(name, prepared, config, "dlrm", scorers, [0], [0.75])[1])
        assert planted(prepared) is None
    assert grid.run(cells, tmp_path, jobs=2, commit="c0ffee") == {}
    rows = pq.read_table(tmp_path / "selection.parquet").to_pylist()
    features = {row["data"]: (row["features_total"], row["features_kept"]) for row in rows}
    assert features == {"flights13": (32, 24), "diabetes130": (48, 36), "census_kdd": (40, 30)}
    for row in rows:
        assert row["auc"] > 0.6
        assert row["ne"] < 1
        # Relative to the largest output where that is above 1.
        assert row["parity_max_abs"] <= 1e-5
        assert row["table_bytes_after"] < row["table_bytes_before"]
        assert row["noise_dropped"] is None


def test_every_default_of_the_grid_is_a_known_section_of_a_run() -> None:
    for name in (*settings.REAL, *settings.PLANTED, "unknown"):
        config = settings.shared_config(name, settings.BACKBONES["dlrm"])
        assert not config.keys() & {"data", "scorer", "seed"}
        assert config["pretrain"].items() >= settings.PRETRAIN.items()


def test_a_paired_difference_has_the_interval_of_students_t() -> None:
    estimate = paired({0: 2.0, 1: 4.0, 2: 6.0, 3: 8.0, 9: 100.0}, {0: 1.0, 1: 2, 2: 3, 3: 4, 5: 0})
    # Differences 1, 2, 3, 4: variance 5/3, and 3.182 for 3 degrees of freedom.
    assert estimate.count == 4
    assert estimate.mean == 2.5
    assert estimate.deviation == pytest.approx(math.sqrt(5 / 3))
    assert estimate.half_width == pytest.approx(3.182 * math.sqrt(5 / 3) / 2)
    assert estimate.is_clear
    assert not Estimate.of([1.0]).is_clear
    assert not Estimate.of([-1.0, 1.0, 3.0]).is_clear


def test_the_area_is_the_sum_of_trapezoids_that_end_at_the_full_model() -> None:
    differences = {0.75: 0.01, 0.25: -0.06, 0.5: -0.02}
    assert area(differences) == pytest.approx(0.25 * (-0.04 - 0.005 + 0.005))
    assert area({}) == 0


def test_spearman_is_the_correlation_of_ranks_with_ties_at_their_mean() -> None:
    scores = {"a": 1.0, "b": 5.0, "c": 100.0, "d": 7.0}
    assert spearman(scores, {name: value**3 for name, value in scores.items()}) == pytest.approx(1)
    assert spearman(scores, {name: -value for name, value in scores.items()}) == pytest.approx(-1)
    # Ranks 1, 2, 4, 3 and 1.5, 1.5, 3, 4, whose deviations from 2.5 multiply to 3.5,
    # with squares that add up to 5 and 4.5.
    others = {"d": 9.0, "a": 0.0, "b": 0.0, "c": 3.0}
    assert spearman(scores, others) == pytest.approx(3.5 / math.sqrt(5 * 4.5))
    assert math.isnan(spearman(scores, dict.fromkeys(scores, 0.0)))


def test_jaccard_is_the_share_of_features_in_both() -> None:
    assert jaccard(["a", "b", "c"], ["c", "d"]) == 1 / 4


def row_of(scorer: str, seed: int, fraction: float, auc: float, **figures: Any) -> dict[str, Any]:
    kept = '["a", "b"]' if seed else '["b", "c"]'
    measured = {
        **{"data": "clicks", "backbone": "dlrm", "scorer": scorer, "seed": seed},
        **{"fraction": fraction, "auc": auc, "logloss": 0.5, "ne": 0.9, "pruned_auc": 0.6},
        **{"selection_seconds": 1.0, "prune_seconds": 1.0, "continue_seconds": 3.0},
        **{"selection_samples": 20, "selection_forwards": 60, "continue_samples": 80},
        **{"features_kept": 2, "features_total": 3},
        **{"table_bytes_before": 1000, "table_bytes_after": 250, "kept": kept},
        **{"scores": '{"a": 1, "b": 2, "c": 3}', "parity_max_abs": 0.0, "noise_dropped": None},
        **{"device": "cpu", "threads": 1, "jobs": 1, "commit": "c0ffee", "config_digest": "0"},
    }
    return measured | figures


def test_the_report_pairs_by_seed_and_relates_costs_to_the_full_model() -> None:
    full = {"selection_seconds": 0.0, "prune_seconds": 0.0, "continue_seconds": 10.0}
    rows = [row_of(FULL, seed, 1.0, 0.8 + seed / 10, **full) for seed in range(2)]
    rows += [row_of("lpfs", seed, 0.5, 0.81 + seed / 10 + seed / 50) for seed in range(2)]
    rows += [row_of("hard_concrete", seed, 0.5, 0.7 + seed / 10) for seed in range(2)]
    text = report(rows)
    # Differences 0.01 and 0.03: mean 0.02, sd 0.01414, and 12.706 / sqrt(2) of it.
    # Minus the gates' 0.7 and 0.8: 0.11 and 0.13.
    differences = "+0.0200 ± 0.1271 (0.0141) | +0.1200 ± 0.1271 (0.0141)"
    assert f"| lpfs | 2 | 2 | 0.8700 | {differences} |" in text
    # Half of the kept range, as a triangle; kept sets share one of three features.
    assert "| lpfs | +0.0050 ± 0.0318 (0.0035) | 1.00 | 0.33 |" in text
    # The only other scorer is the best one, and there is no result for random features.
    short = "**-0.1000 ± 0.0000 (0.0000)** | lpfs, +0.0200 | -0.1200 ± 0.1271 (0.0141) | - |"
    assert f"| clicks | dlrm | 50% | {short} 0.10 | 0.50 |" in text
    assert "| hard_concrete | 2 | 2 | 0.7500 | **-0.1000 ± 0.0000 (0.0000)** |  |" in text
    assert "| 0.6000 | 0.25 | 0.10 | 0.50 | 0.25 | 0.75 | 0e+00 |" in text


def test_the_report_says_which_rows_no_commit_reproduces() -> None:
    rows = [row_of(FULL, 0, 1.0, 0.8), row_of(FULL, 1, 1.0, 0.8, commit="abad1de-dirty")]
    text = report(rows)
    assert "1 rows were measured at commit c0ffee." in text
    assert "1 rows cannot be reproduced exactly" in text
    assert "uncommitted changes on top of commit abad1de." in text


def test_a_grid_of_uncommitted_code_is_refused(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=tester", "-c", "user.email=tester@example.com"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "code.py").write_text("")
    git("add", "code.py")
    git("commit", "-m", "Add code")
    # Results are written while the grid runs, and are not code.
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "selection.parquet").write_text("")
    assert git("rev-parse", "HEAD").startswith(grid.clean_commit(tmp_path))
    (tmp_path / "code.py").write_text("changed = True")
    with pytest.raises(RuntimeError, match=r"uncommitted changes:\nM code.py\nCommit them first"):
        grid.clean_commit(tmp_path)


def test_the_report_refuses_rows_of_different_settings() -> None:
    rows = [row_of("good", 0, 0.5, 0.8), row_of("good", 1, 0.5, 0.8, config_digest="1")]
    with pytest.raises(ValueError, match="clicks-dlrm-good was run with different settings"):
        report(rows)
