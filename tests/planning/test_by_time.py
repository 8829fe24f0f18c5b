"""The search by time: few estimates, all TorchRec's own; tables are split where that pays."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator
from torchrec.distributed.planner.types import ShardingOption
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from tests.support.planned_models import topology
from torchrec_fmp.gates.sharded import sharders
from torchrec_fmp.planning.by_time import ByTimeEnumerator, Candidate, choices

TYPES = [t.value for t in ShardingType if t is not ShardingType.DATA_PARALLEL]
POOLING = 20.0


def model(count: int = 1, rows: int = 1003, columns: int = 128) -> EmbeddingBagCollection:
    tables = [
        EmbeddingBagConfig(
            name=f"t_{i}", num_embeddings=rows, embedding_dim=columns, feature_names=[f"f_{i}"]
        )
        for i in range(count)
    ]
    return EmbeddingBagCollection(tables=tables, device=torch.device("meta"))


def enumerator(
    ranks: Topology, tables: EmbeddingBagCollection, types: Sequence[str], shard_bytes: float = 1e12
) -> ByTimeEnumerator:
    constraints = {
        config.name: ParameterConstraints(pooling_factors=[POOLING])
        for config in tables.embedding_bag_configs()
    }
    return ByTimeEnumerator(ranks, 512, constraints, types, shard_bytes)


@pytest.mark.parametrize("sharding_type", TYPES)
def test_shard_estimates_equal_torchrecs_own(sharding_type: str) -> None:
    ranks, tables = topology(16, local_world_size=8, hbm=2**40), model()
    [option] = enumerator(ranks, tables, [sharding_type]).enumerate(tables, list(sharders()))[:1]
    columns = option.shards[0].size[1]
    constraint = ParameterConstraints(
        sharding_types=[sharding_type],
        compute_kernels=["fused"],
        pooling_factors=[POOLING],
        min_partition=columns,
    )
    [theirs] = EmbeddingEnumerator(ranks, 512, {"t_0": constraint}).enumerate(
        tables, list(sharders())
    )
    assert option.sharding_type == theirs.sharding_type
    # With 1,003 rows, the last shard has fewer rows than the others.
    assert option.shards == theirs.shards


def test_number_of_estimates_does_not_grow_with_identical_tables_or_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    estimated = 0
    estimate = EmbeddingStorageEstimator.estimate

    def counting(self: Any, sharding_options: list[ShardingOption], sharder_data_map: Any) -> None:
        nonlocal estimated
        estimated += sum(option.num_shards for option in sharding_options)
        estimate(self, sharding_options, sharder_data_map)

    monkeypatch.setattr(EmbeddingStorageEstimator, "estimate", counting)
    counts = []
    for count, world_size in ((1, 16), (50, 16), (50, 256)):
        estimated = 0
        tables, ranks = model(count, rows=1024), topology(world_size, local_world_size=8, hbm=2**40)
        enumerator(ranks, tables, TYPES).enumerate(tables, list(sharders()))
        counts.append(estimated)
    assert counts[0] == counts[1] == counts[2] > 0


def test_a_single_dominant_table_is_split_and_many_small_tables_are_not() -> None:
    ranks = topology(8, local_world_size=8, hbm=2**40)
    one, many = model(1), model(200)
    alone, among = enumerator(ranks, one, TYPES), enumerator(ranks, many, TYPES)
    alone.enumerate(one, list(sharders()))
    among.enumerate(many, list(sharders()))
    assert all(proposal[0].num_shards >= 8 for proposal in alone.proposals)
    assert {option.sharding_type for option in among.proposals[-1]} == {"table_wise"}


def test_shards_fit_the_byte_limit_or_are_the_smallest_possible() -> None:
    ranks, tables = topology(8, local_world_size=4, hbm=2**40), model(rows=4_000_000)
    types = ["table_wise", "row_wise"]
    whole, limited, impossible = (
        enumerator(ranks, tables, types, shard_bytes) for shard_bytes in (2**40, 2**29, 1)
    )
    for found in (whole, limited, impossible):
        found.enumerate(tables, list(sharders()))
    assert [proposal[0].sharding_type for proposal in whole.proposals] == ["table_wise"]
    assert [proposal[0].sharding_type for proposal in limited.proposals] == ["row_wise"]
    assert [proposal[0].sharding_type for proposal in impossible.proposals] == ["row_wise"]


@pytest.mark.parametrize(
    ("sharding_type", "device"), [("grid_shard", "cpu"), ("data_parallel", "cuda")]
)
def test_a_sharding_type_without_a_fused_kernel_on_the_device_is_refused(
    sharding_type: str, device: str
) -> None:
    ranks, tables = topology(4, device), model()
    found = enumerator(ranks, tables, [sharding_type])
    message = rf"t_0 cannot be sharded by any of \['{sharding_type}'\] on {device}"
    with pytest.raises(ValueError, match=message):
        found.enumerate(tables, list(sharders()))


milliseconds = st.floats(0.1, 100.0)
ways = st.lists(st.tuples(milliseconds, st.integers(1, 8)), min_size=1, max_size=3)


@given(st.lists(ways, min_size=1, max_size=4), st.integers(1, 8))
def test_the_first_choice_minimizes_the_bound_on_the_slowest_rank(
    tables: list[list[tuple[float, int]]], world_size: int
) -> None:
    allowed = {
        i: [Candidate(f"way_{j}", None, ms, ms * shards) for j, (ms, shards) in enumerate(found)]
        for i, found in enumerate(tables)
    }

    def bound(choice: Sequence[Candidate]) -> float:
        mean = sum(candidate.table_ms for candidate in choice) / world_size
        return mean + max(candidate.shard_ms for candidate in choice)

    found = choices(allowed, world_size)
    least = min(bound(choice) for choice in itertools.product(*allowed.values()))
    assert bound(list(found[0].values())) == pytest.approx(least)
    slowest = [max(candidate.shard_ms for candidate in choice.values()) for choice in found]
    assert slowest == sorted(slowest)
