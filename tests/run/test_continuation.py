"""Continued training after the prune: its starting point and its learning rates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel

from tests.run.test_pipeline import this_rank
from tests.support.process_group import ProcessGroup
from tests.support.tiny_run import tiny, write_config
from torchrec_fmp.data.schema import Schema
from torchrec_fmp.embeddings.local_shards import dense_tensors, local_shards, sharded_collections
from torchrec_fmp.run.config import RunConfig, load_config
from torchrec_fmp.run.pipeline import Pipeline
from torchrec_fmp.run.rows import Stretch
from torchrec_fmp.strict import ConfigError
from torchrec_fmp.training.job import Job

STEP = 5
DROPPED = ["noise_0", "noise_1", "noise_2"]


def tables(model: DistributedModelParallel, state: bool = False) -> dict[str, Tensor]:
    """This rank's shard of each table, or the fused optimizer's state of it."""
    found = {}
    for collection in sharded_collections(model).values():
        for shard in local_shards(collection):
            tensors = torch.cat([t.flatten() for t in shard.states.values()])
            found[shard.table] = tensors if state else shard.weight.clone()
    return found


def layers(model: DistributedModelParallel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in dense_tensors(model).items()}


def early_model(config: RunConfig) -> DistributedModelParallel:
    """After the first steps of pretraining, with the gates open."""
    pipeline = Pipeline(config, this_rank())
    pretraining = pipeline._pretraining(job_of(config, config.data.schema, gated=True))
    pretraining.train(STEP)
    return pretraining.job.model


def job_of(config: RunConfig, schema: Schema, gated: bool) -> Job:
    return Pipeline(config, this_rank())._build(gated, schema)


class Started(Exception):
    """Carries the job that the last phase begins with."""

    def __init__(self, job: Job) -> None:
        self.job = job


class UntilContinue(Pipeline):
    """Stops where the last phase begins."""

    def _train(self, job: Job, phase: str, *args: Any, **kwargs: Any) -> None:
        raise Started(job)


def started(config: RunConfig) -> Job:
    with pytest.raises(Started) as stopped:
        UntilContinue(config, this_rank()).run()
    return stopped.value.job


def check_rewound(config_path: str) -> None:
    config, _ = load_config(config_path)
    job = started(config)
    early_one = early_model(config)
    early, late = tables(early_one), tables(job.model)
    assert late.keys() <= early.keys()
    assert all(torch.equal(weight, early[table]) for table, weight in late.items())
    early, late = layers(early_one), layers(job.model)
    # The last layer has no columns of features, so the cut leaves it whole.
    whole = [name for name in late if "over_arch.model.1." in name]
    assert len(whole) == 2
    assert all(torch.equal(late[name], early[name]) for name in whole)
    assert not job.optimizer.state
    assert all(not state.any() for state in tables(job.model, state=True).values())


def carries(config_path: str) -> tuple[bool, bool]:
    """Whether this rank's tables differ from early ones, and whether they have a state."""
    config, _ = load_config(config_path)
    job = started(config)
    assert job.optimizer.state
    early, late = tables(early_model(config)), tables(job.model)
    states = tables(job.model, state=True).values()
    return any(not torch.equal(late[t], early[t]) for t in late), any(s.any() for s in states)


def check_reinitialized(config_path: str) -> None:
    config, _ = load_config(config_path)
    job = started(config)
    fresh = job_of(config, job.schema, gated=False)
    assert set(job.schema.sparse_names).isdisjoint(DROPPED)
    for read in (tables, layers):
        expected, actual = read(fresh.model), read(job.model)
        assert expected.keys() == actual.keys()
        assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert not job.optimizer.state
    assert all(not state.any() for state in tables(job.model, state=True).values())


def config_with(directory: Path, ranks: ProcessGroup, **continuation: Any) -> str:
    # Row-wise: every rank has a part of every table. The gates stay open for the early steps.
    settings = {
        "pretrain__batch_size": 32 // ranks.world_size,
        "planner__sharding_types": ["row_wise"],
        "replan": "sticky",
        "continuation": continuation,
    }
    return write_config(directory, tiny(**settings))


def test_a_rewound_model_has_the_weights_of_the_early_step_and_fresh_optimizers(
    run_ranks: ProcessGroup, tmp_path: Path
) -> None:
    run_ranks.run(
        check_rewound, config_with(tmp_path, run_ranks, start="rewound", rewind_steps=STEP)
    )


def test_carried_tables_keep_their_training_and_their_states(
    run_ranks: ProcessGroup, tmp_path: Path
) -> None:
    assert (True, True) in run_ranks.run(carries, config_with(tmp_path, run_ranks))


def test_a_reinitialized_model_is_a_fresh_model_of_the_kept_features(
    run_ranks: ProcessGroup, tmp_path: Path
) -> None:
    run_ranks.run(check_reinitialized, config_with(tmp_path, run_ranks, start="reinitialized"))


class Rates(Pipeline):
    """Records both learning rates before each step of the last phase."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.dense: list[float] = []
        self.fused: list[float] = []

    def _train(self, job: Job, phase: Any, rows: Any, extra: Any = None) -> None:
        kernels = [
            shard.kernel.emb_module
            for collection in sharded_collections(job.model).values()
            for shard in local_shards(collection)
        ]
        rates = self

        class Noted(Stretch):
            def steps(self, batch_size: int) -> int:
                return 10

            def batches(self, batch_size: int) -> Iterator[Batch]:
                for batch in self.reader.batches(batch_size, 0, 10 * batch_size):
                    rates.dense.append(job.optimizer.param_groups[0]["lr"])
                    rates.fused += [kernels[0].get_learning_rate()] if kernels else []
                    yield batch

        super()._train(job, phase, [Noted(rows[1].reader)], extra)


def rates_of(config_path: str) -> tuple[list[float], list[float]]:
    config, _ = load_config(config_path)
    pipeline = Rates(config, this_rank())
    pipeline.run()
    return pipeline.dense, pipeline.fused


def test_warm_up_starts_small_and_reaches_both_configured_rates(
    run_ranks: ProcessGroup, tmp_path: Path
) -> None:
    expected = [0.25, 0.5, 0.75] + [1.0] * 7
    for dense, fused in run_ranks.run(rates_of, config_with(tmp_path, run_ranks, warmup_steps=3)):
        assert dense == pytest.approx([5e-3 * share for share in expected])
        assert dense[-1] == 5e-3
        assert fused == pytest.approx([2e-2 * share for share in expected])


@pytest.mark.parametrize(
    ("continuation", "message"),
    [
        ({"warmup_steps": -1}, "continuation.warmup_steps is -1; it must be at least 0"),
        ({"rewind_steps": 3}, "only start: rewound reads"),
    ],
)
def test_invalid_or_unused_options_are_refused(
    tmp_path: Path, continuation: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write_config(tmp_path, tiny(continuation=continuation)))


def too_late(config_path: str) -> str:
    config, _ = load_config(config_path)
    with pytest.raises(ValueError) as error:
        Pipeline(config, this_rank()).run()
    return str(error.value)


def test_a_rewind_beyond_pretraining_is_refused_with_its_number_of_steps(
    ranks_1: ProcessGroup, tmp_path: Path
) -> None:
    config = config_with(tmp_path, ranks_1, start="rewound", rewind_steps=1000)
    assert "pretraining took 156 steps" in ranks_1.run(too_late, config)[0]
