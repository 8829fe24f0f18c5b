"""Pretraining reads the rows that were chosen for it, and each row is trained on once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torchrec.datasets.utils import Batch

from tests.run.test_pipeline import this_rank
from tests.support.process_group import ProcessGroup
from tests.support.tiny_run import tiny, write_config
from torchrec_fmp.run.config import load_config
from torchrec_fmp.run.pipeline import Pipeline

ROWS = 1000


def write_numbered(directory: Path, **settings: Any) -> str:
    """A row's id is its number, so the last rows have other ids; labels depend on it, too."""
    numbers = list(range(ROWS))
    table = pa.table({"label": [n % 3 == 0 for n in numbers], "row": numbers})
    pq.write_table(table, directory / "rows.parquet", row_group_size=130)
    files = [str(directory / "rows.parquet")]
    arguments = {"train": files, "test": files, "label": "label", "dense": []}
    data = {
        "class_path": "torchrec_fmp.data.parquet.ParquetDataset",
        "init_args": {**arguments, "sparse": {"row": ROWS}},
    }
    settings = {"pretrain__batch_size": 8, "train__batch_size": 8, **settings}
    return write_config(directory, tiny(data=data, pretrain__fraction=0.3, **settings))


def numbers(batches: Any) -> list[int]:
    def of(batch: Batch) -> list[int]:
        return batch.sparse_features.values().tolist()

    return [number for batch in batches for number in of(batch)]


def read(config_path: str, trained_rows: int) -> tuple[list[int], list[int], list[int]]:
    """Rows that this rank reads in pretraining, for validation, and in continued training."""
    config, _ = load_config(config_path)
    pipeline = Pipeline(config, this_rank())
    pretraining = pipeline._pretraining(pipeline._build(gated=True))
    continued = pipeline._rows.continued(pretraining.job.schema, trained_rows)
    return (
        numbers(pretraining.batches()),
        numbers(pretraining.validation_batches(100)),
        numbers(batch for stretch in continued for batch in stretch.batches(8)),
    )


@pytest.mark.parametrize("subset", ["Prefix", "Random", "Stratified", "RecentResampling"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_row_is_trained_on_once_in_pretraining_or_later(
    run_ranks: ProcessGroup, tmp_path: Path, subset: str, shuffle: bool
) -> None:
    config = write_numbered(
        tmp_path, pretrain__subset={"class_path": subset}, train__shuffle=shuffle
    )
    outcomes = run_ranks.run(read, config, 0)
    chosen, validation, continued = (
        [number for outcome in outcomes for number in outcome[part]] for part in range(3)
    )
    world_size = run_ranks.world_size
    assert len(chosen) == 300 // (8 * world_size) * 8 * world_size
    assert len(set(chosen)) == len(chosen)
    # Pretraining trained on no row, so all rows are left for continued training.
    assert len(set(continued)) == len(continued)
    assert len(continued) > ROWS - 2 * 8 * world_size
    assert set(chosen) <= set(continued)
    assert len(validation) == 100 // (8 * world_size) * 8 * world_size
    assert not set(validation) & set(chosen)
    if subset == "Prefix":
        assert max(chosen) < min(set(validation))
        assert set(chosen) == set(range(len(chosen)))


def test_continued_training_starts_with_the_rows_that_a_scorer_left(
    run_ranks: ProcessGroup, tmp_path: Path
) -> None:
    config = write_numbered(tmp_path)
    for chosen, _, continued in run_ranks.run(read, config, 16):
        assert continued[: len(chosen) - 16] == chosen[16:]
        assert not set(chosen[:16]) & set(continued)


def test_the_same_rows_are_chosen_whatever_the_world_size(
    ranks_1: ProcessGroup, ranks_2: ProcessGroup, tmp_path: Path
) -> None:
    # A whole number of batches for both.
    config = write_numbered(tmp_path, pretrain__samples=320)
    alone, divided = (ranks.run(read, config, 0) for ranks in (ranks_1, ranks_2))
    assert sorted(alone[0][0]) == sorted(divided[0][0] + divided[1][0])
