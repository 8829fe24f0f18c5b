"""The full path on slices of real data sets, where they are at hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from torchrec_fmp.cli import main

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
ROWS = 60_000

MOST = [
    *("--scorer.penalty", "TargetPenalty", "--scorer.penalty.keep", "0.75"),
    *("--policy", "TopFraction", "--policy.fraction", "0.75"),
]

pytestmark = pytest.mark.skipif(
    not DATA.is_dir(), reason="the real data sets are not at ../shared/data of the repository"
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prepare(name: str, directory: Path) -> int:
    """Prepares the first rows, the last tenth of them to test on; the number of features."""
    table = pq.read_table(DATA / f"{name}.parquet").slice(0, ROWS).drop_columns(["is_test"])
    raw = directory / f"{name}.parquet"
    pq.write_table(table, raw)
    arguments = ["parquet", str(raw), "--label", "label", "--out", str(directory / "prepared")]
    assert main(["prepare", *arguments]) == 0
    return table.num_columns - 1


@pytest.mark.parametrize("name", ["flights13", "diabetes130", "census_kdd"])
def test_a_slice_of_real_data_goes_through_the_full_path(name: str, tmp_path: Path) -> None:
    features = prepare(name, tmp_path)
    out = tmp_path / "out"
    config = str(ROOT / "configs" / f"{name}.yaml")
    overrides = ["--data.path", str(tmp_path / "prepared"), *MOST]
    assert main(["run", config, "--out", str(out), *overrides]) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["features_total"] == features
    assert result["features_kept"] == len(result["kept"]) == features * 3 // 4
    assert len(result["kept"]) + len(result["dropped"]) == features
    assert result["metrics"]["final"]["auc"] > 0.6
    assert result["metrics"]["final"]["ne"] < 1
    # Relative to the largest output where that is above 1.
    assert result["parity_max_abs"] <= 1e-5
    assert result["bytes"]["after"] < result["bytes"]["before"]
    assert result["planted"] is None
    assert result["replaced"] == []
