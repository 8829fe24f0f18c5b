"""Data-parallel tables that torch's Adam trains, in a param group of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.datasets.utils import Batch

from tests.run.test_continuation import started
from tests.run.test_pipeline import run, this_rank
from tests.support.dlrm_model import assemble, pieces
from tests.support.process_group import ProcessGroup
from tests.support.tiny_run import tiny, write_config
from torchrec_fmp.data.reader import Reader
from torchrec_fmp.embeddings.local_shards import local_shards, sharded_collections
from torchrec_fmp.run.config import RunConfig, load_config
from torchrec_fmp.run.pipeline import Pipeline
from torchrec_fmp.strict import ConfigError
from torchrec_fmp.training.job import Job

RATE, TABLES_RATE = 5e-3, 3e-3
STEPS = 3


def config_with(directory: Path, **settings: Any) -> str:
    adam = {
        "train__embedding_optimizer": "adam",
        "train__embedding_learning_rate": TABLES_RATE,
        "train__learning_rate": RATE,
        "planner__sharding_types": ["data_parallel"],
    }
    return write_config(directory, tiny(**{**adam, **settings}))


def job_of(config: RunConfig) -> Job:
    return Pipeline(config, this_rank())._build(gated=False)


def whole_tables(job: Job) -> dict[str, Tensor]:
    mine = pieces(job.model)
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine)
    return {table: tensors["weight"] for table, tensors in assemble(of_ranks).items()}


def batches_of(config: RunConfig, rank: int) -> list[Batch]:
    source, world_size = config.data.source("train"), dist.get_world_size()
    reader = Reader(source, config.data.schema, rank=rank, world_size=world_size)
    return list(reader.batches(64 // world_size, 0, STEPS * 64 // world_size))


def unsharded(config: RunConfig, job: Job) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A copy of the job's model, and its tables."""
    plain = config.model.build(config.data.schema, torch.device("cpu"))
    collection = plain.model.sparse_arch.embedding_bag_collection
    collection.to_empty(device="cpu")
    start = whole_tables(job)
    tables = {table: collection.embedding_bags[table].weight for table in start}
    layers = dict(plain.named_parameters())
    with torch.no_grad():
        for table, weight in tables.items():
            weight.copy_(start[table])
        for name, parameter in job.model.module.named_parameters():
            if "embedding_bags" not in name:
                layers[name.replace("module.", "")].copy_(parameter)
    return plain, tables


def check_against_torch(config_path: str) -> None:
    """Trains the model and its unsharded copy on the batches of all ranks."""
    config, _ = load_config(config_path)
    job = job_of(config)
    start = whole_tables(job)
    plain, tables = unsharded(config, job)
    in_tables = {id(weight) for weight in tables.values()}
    groups = [
        {"params": [p for p in plain.parameters() if id(p) not in in_tables], "lr": RATE},
        {"params": list(tables.values()), "lr": TABLES_RATE},
    ]
    optimizer = torch.optim.Adam(groups)
    shares = [batches_of(config, rank) for rank in range(dist.get_world_size())]
    for of_ranks in zip(*shares, strict=True):
        job.optimizer.zero_grad()
        job.model(of_ranks[dist.get_rank()])[0].backward()
        job.optimizer.step()
        optimizer.zero_grad()
        torch.stack([plain(batch)[0] for batch in of_ranks]).mean().backward()
        optimizer.step()
    trained = whole_tables(job)
    assert trained.keys() == tables.keys()
    for table, weight in tables.items():
        assert not torch.equal(trained[table], start[table])
        torch.testing.assert_close(trained[table], weight.detach(), rtol=1e-4, atol=1e-6)


def test_three_steps_equal_torch_adam_on_unsharded_tables(
    run_ranks: ProcessGroup, tmp_path: Path
) -> None:
    run_ranks.run(check_against_torch, config_with(tmp_path))


def states_after_prune(config_path: str) -> tuple[set[str], list[tuple[float, bool, float]]]:
    """Kernels of the tables; step, presence of moments, and rate of each of this rank's tables."""
    config, _ = load_config(config_path)
    job = started(config)
    plan = next(iter(job.model.plan.plan.values()))
    held = {id(p): group for group in job.optimizer.param_groups for p in group["params"]}
    found = []
    for collection in sharded_collections(job.model).values():
        weights = dict(collection.named_parameters())
        for table in {shard.table for shard in local_shards(collection)}:
            (weight,) = [w for name, w in weights.items() if f".{table}." in name]
            state = job.optimizer.state[weight]
            moments = bool(state["exp_avg"].any()) and bool(state["exp_avg_sq"].any())
            found.append((float(state["step"]), moments, held[id(weight)]["lr"]))
    return {sharding.compute_kernel for sharding in plan.values()}, found


def test_the_prune_carries_step_and_moments_of_the_tables(
    run_ranks: ProcessGroup, tmp_path: Path
) -> None:
    config = config_with(tmp_path, pretrain__batch_size=32 // run_ranks.world_size)
    results = run_ranks.run(states_after_prune, config)
    assert all(kernels == {"dense"} for kernels, _ in results)
    tables = [table for _, found in results for table in found]
    assert tables and all(table == (5000 // 32, True, TABLES_RATE) for table in tables)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"continuation": {"start": "rewound", "rewind_steps": 2, "warmup_steps": 3}},
        {"continuation": {"start": "reinitialized"}, "reference": True},
    ],
    ids=["carried", "rewound", "reinitialized"],
)
def test_a_whole_run_learns_and_every_rank_decides_alike(
    run_ranks: ProcessGroup, tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = config_with(tmp_path, pretrain__batch_size=32 // run_ranks.world_size, **settings)
    outcomes = run_ranks.run(run, config)
    assert len({digest for _, digest in outcomes}) == 1
    for result, _ in outcomes:
        assert result["metrics"] == outcomes[0][0]["metrics"]
        assert result["metrics"]["final"]["auc"] > 0.7
        assert result["bytes"]["after"] < result["bytes"]["before"]


def test_the_planners_warnings_about_data_parallel_tables_are_not_shown(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torchrec_fmp.cli", "run", config_with(tmp_path)]
    shown = subprocess.run(
        [*command, "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert shown.returncode == 0, shown.stderr
    assert "Sharding spec" not in shown.stderr


def refused(config_path: str) -> str:
    config, _ = load_config(config_path)
    with pytest.raises(ValueError) as error:
        job_of(config)
    return str(error.value)


def test_a_sharded_table_on_cpu_is_refused_on_all_ranks_and_the_error_says_what_to_set(
    run_ranks: ProcessGroup, tmp_path: Path
) -> None:
    config = config_with(tmp_path, planner__tables={"t_main_1": ["row_wise"]})
    for message in run_ranks.run(refused, config):
        assert "the plan shards t_main_1, but FBGEMM has no fused Adam on CPU" in message
        assert "planner.sharding_types to [data_parallel]" in message


@pytest.mark.parametrize(
    "planner",
    [
        {"sharding_types": ["data_parallel", "table_wise"]},
        {"tables": {"t_main_0": ["data_parallel"]}},
    ],
)
def test_data_parallel_tables_without_the_dense_optimizer_are_refused(
    tmp_path: Path, planner: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="data_parallel tables train with the dense optimizer"):
        load_config(write_config(tmp_path, tiny(planner=planner)))


def test_an_unknown_embedding_optimizer_is_refused_and_names_the_known_ones(
    tmp_path: Path,
) -> None:
    config = write_config(tmp_path, tiny(train__embedding_optimizer="sgd"))
    with pytest.raises(ConfigError, match="embedding_optimizer(.|\n)*rowwise_adagrad(.|\n)*adam"):
        load_config(config)
