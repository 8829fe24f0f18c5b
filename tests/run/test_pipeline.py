"""The whole pipeline on one and two ranks."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.support.process_group import ProcessGroup
from tests.support.tiny_run import tiny, write_config
from torchrec_fmp.distributed.ranks import Ranks
from torchrec_fmp.embeddings.local_shards import local_shards, sharded_collections
from torchrec_fmp.gates.attach import feature_gates
from torchrec_fmp.run.config import load_config
from torchrec_fmp.run.pipeline import Pipeline
from torchrec_fmp.run.result import result_of
from torchrec_fmp.training.metrics import Metrics, _gather, evaluate

ROOT = Path(__file__).parents[2]


def this_rank() -> Ranks:
    group = dist.group.WORLD
    assert group is not None
    return Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), group)


def run(config_path: str) -> tuple[dict[str, Any], str]:
    """The result and the selection's digest."""
    config, _ = load_config(config_path)
    ranks = this_rank()
    outcome = Pipeline(config, ranks).run()
    return result_of(outcome, config, ranks), outcome.selection.digest()


@pytest.mark.parametrize("sharding_type", ["table_wise", "row_wise"])
def test_the_planted_signal_stays_and_every_rank_decides_alike(
    run_ranks: ProcessGroup, tmp_path: Path, sharding_type: str
) -> None:
    # Half a batch on each of two ranks is the same step.
    half = {"pretrain__batch_size": 32 // run_ranks.world_size}
    config = tiny(planner__sharding_types=[sharding_type], **half)
    outcomes = run_ranks.run(run, write_config(tmp_path, config))
    assert len({digest for _, digest in outcomes}) == 1
    for result, _ in outcomes:
        assert result["kept"] == list(result["planted"]["signal"])
        assert result["world_size"] == run_ranks.world_size
        # Relative to the largest logit it is within 1e-6; otherwise the prune would be refused.
        assert result["parity_max_abs"] <= 1e-5
        assert result["metrics"] == outcomes[0][0]["metrics"]
        assert result["metrics"]["final"]["auc"] > 0.85
        assert result["samples"]["pretrain"] == 5000 // 32 * 32


@pytest.mark.parametrize("unit", ["bytes", "step_ms"])
def test_a_cost_budget_is_met_and_every_rank_decides_alike(
    ranks_2: ProcessGroup, tmp_path: Path, unit: str
) -> None:
    half = {"keep": 0.5, "unit": unit}
    config = tiny(
        pretrain__batch_size=16,
        scorer__init_args__penalty={"class_path": "TargetPenalty", "init_args": half},
        policy={"class_path": "TopBudget", "init_args": half},
    )
    outcomes = ranks_2.run(run, write_config(tmp_path, config))
    assert len({digest for _, digest in outcomes}) == 1
    result, _ = outcomes[0]
    assert {"main_0", "main_1"} <= set(result["kept"])
    if unit == "bytes":
        assert result["bytes"]["after"] <= 0.5 * result["bytes"]["before"]


def test_pretraining_takes_the_configured_number_of_samples_over_all_ranks(
    run_ranks: ProcessGroup, tmp_path: Path
) -> None:
    config = tiny(pretrain__samples=2100, pretrain__batch_size=32 // run_ranks.world_size)
    for result, _ in run_ranks.run(run, write_config(tmp_path, config)):
        assert result["samples"]["pretrain"] == 2100 // 32 * 32


def first_shards(config_path: str) -> dict[str, Tensor]:
    """First rows of this rank's shard of each table, before any training."""
    config, _ = load_config(config_path)
    job = Pipeline(config, this_rank())._build(gated=False)
    (collection,) = sharded_collections(job.model).values()
    return {s.table: s.weight[:2].clone() for s in local_shards(collection) if len(s.weight) > 1}


def test_shards_of_a_table_do_not_start_as_copies_of_each_other(
    ranks_2: ProcessGroup, tmp_path: Path
) -> None:
    # Shards of equal size, so that both ranks draw equally many numbers.
    even = tiny(planner__sharding_types=["row_wise"], data__init_args__cardinalities=[8, 8])
    config = write_config(tmp_path, even)
    first, second = ranks_2.run(first_shards, config)
    assert first.keys() == second.keys() and first
    for table, rows in first.items():
        assert not torch.equal(rows, second[table]), table


def noise_seeds(config_path: str, seed: int) -> set[int]:
    config, _ = load_config(config_path, ["--seed", str(seed)])
    job = Pipeline(config, this_rank())._build(gated=True)
    return {module.config.seed for _, module in feature_gates(job.model)}


def test_the_seed_of_a_run_also_seeds_the_gate_noise(ranks_1: ProcessGroup, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny())
    assert ranks_1.run(noise_seeds, config, 3) != ranks_1.run(noise_seeds, config, 4)


def test_bad_values_are_counted_over_all_ranks(ranks_2: ProcessGroup, tmp_path: Path) -> None:
    ids = [i % 4 for i in range(2000)]
    # One in each rank's half of the row groups.
    ids[3] = ids[1500] = -1
    config = write_parquet_config(tmp_path, ids, train__bad_input="replace")
    for result, _ in ranks_2.run(run, config):
        assert result["replaced"] == [{"column": "a", "problem": "negative id", "count": 2}]


def write_parquet_config(directory: Path, ids: list[int], **settings: Any) -> str:
    """One sparse feature, two row groups; the second is the second rank's."""
    table = pa.table({"label": [i % 3 == 0 for i in range(len(ids))], "a": ids})
    test = table.set_column(1, "a", pa.array([0] * len(ids)))
    pq.write_table(table, directory / "train.parquet", row_group_size=len(ids) // 2)
    pq.write_table(test, directory / "test.parquet")
    data = {
        "class_path": "torchrec_fmp.data.parquet.ParquetDataset",
        "init_args": {
            "train": [str(directory / "train.parquet")],
            "test": [str(directory / "test.parquet")],
            "label": "label",
            "dense": [],
            "sparse": {"a": 4},
        },
    }
    return write_config(directory, tiny(data=data, **settings))


def torchrun(config: str, out: Path, *verb: str) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    }
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--standalone", "-m", "torchrec_fmp.cli"),
            *(*(verb or ["run"]), config, "--out", str(out)),
        ],
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_torchrun_runs_model_parallel_and_reports_it_once(tmp_path: Path) -> None:
    done = torchrun(write_config(tmp_path, tiny()), tmp_path / "out")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["world_size"] == 2
    assert result["parity_max_abs"] <= 1e-5
    assert done.stdout.count("2 ranks on cpu over gloo: tables model-parallel") == 1
    assert done.stdout.count("features   ") == 1


@pytest.mark.slow
def test_evaluating_seeds_on_two_ranks_compares_every_test_row_once(tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny(data__init_args__test_rows=301))
    done = torchrun(config, tmp_path / "out", "evaluate", "--seeds", "2")
    assert done.returncode == 0, done.stderr
    stability = json.loads((tmp_path / "out" / "stability.json").read_text())
    assert stability["world_size"] == 2
    assert stability["test_rows"] == 301
    assert done.stdout.count("single predictions") == 1


def test_an_error_on_one_rank_ends_the_run_with_that_error(tmp_path: Path) -> None:
    ids = [i % 4 for i in range(2000)]
    ids[1234] = 99
    done = torchrun(write_parquet_config(tmp_path, ids), tmp_path / "out")
    assert done.returncode != 0
    (line,) = [text for text in done.stderr.splitlines() if "torchrec-fmp: DataError" in text]
    assert "train.parquet, column 'a', row 1234: id out of range (99)" in line
    assert not (tmp_path / "out" / "result.json").exists()


class Scores(nn.Module):
    """Predicts the value of the dense column."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        assert not self.training
        assert not torch.is_grad_enabled()
        logits = batch.dense_features[:, 0]
        return logits.sum(), (logits.sum(), logits, batch.labels)


def padded(logits: Tensor, labels: Tensor, batch_size: int) -> Iterator[tuple[Batch, int]]:
    """Batches whose padding would ruin every metric if it were counted."""
    for start in range(0, len(logits), batch_size):
        real = min(batch_size, len(logits) - start)
        dense, label = torch.full((batch_size, 1), math.nan), torch.zeros(batch_size)
        dense[:real, 0], label[:real] = logits[start : start + real], labels[start : start + real]
        nothing = KeyedJaggedTensor.from_lengths_sync(
            ["a"], torch.zeros(0, dtype=torch.int64), torch.zeros(batch_size, dtype=torch.int32)
        )
        yield Batch(dense, nothing, label), real


def evaluated() -> Metrics:
    """Metrics of 13 rows, divided unevenly."""
    ranks = this_rank()
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(13, generator=generator)
    labels = torch.randint(0, 2, (13,), generator=generator).float()
    cut = 13 if ranks.world_size == 1 else 9
    mine = slice(0, cut) if ranks.rank == 0 else slice(cut, 13)
    model = Scores()
    model.inner.eval()
    metrics = evaluate(model, padded(logits[mine], labels[mine], 4), ranks)
    assert model.training and not model.inner.training
    return metrics


def test_metrics_cover_all_real_rows_however_they_are_divided(
    ranks_1: ProcessGroup, ranks_2: ProcessGroup
) -> None:
    (alone,) = ranks_1.run(evaluated)
    assert 0 < alone.auc < 1
    for divided in ranks_2.run(evaluated):
        assert divided.auc == alone.auc
        assert divided.logloss == pytest.approx(alone.logloss, rel=1e-12)
        assert divided.ne == pytest.approx(alone.ne, rel=1e-12)


def one_empty_rank() -> Metrics:
    """Metrics if the second rank has only padding."""
    ranks = this_rank()
    logits, labels = torch.tensor([0.5, -1.0]), torch.tensor([1.0, 0.0])
    batches = [(batch, real if ranks.rank == 0 else 0) for batch, real in padded(logits, labels, 2)]
    return evaluate(Scores(), batches, ranks)


def test_a_rank_with_only_padding_adds_nothing(ranks_2: ProcessGroup) -> None:
    assert [metrics.auc for metrics in ranks_2.run(one_empty_rank)] == [1.0, 1.0]


def gathered() -> Tensor:
    rank = this_rank()
    return _gather(torch.arange(40_000 + 10_000 * rank.rank).float() + rank.rank, rank)


def test_predictions_are_gathered_once_and_in_order_from_uneven_ranks(
    ranks_2: ProcessGroup,
) -> None:
    expected = torch.cat([torch.arange(40_000).float(), torch.arange(50_000).float() + 1])
    for values in ranks_2.run(gathered):
        assert torch.equal(values, expected)
