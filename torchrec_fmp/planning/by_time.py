"""An enumerator and a proposer for TorchRec's planner, with few estimates and few proposals.

TorchRec's own estimate every shard of every sharding type of every table before the first plan: a
million shards for 1,000 tables on 1,024 ranks, which takes many minutes. Here, shards of equal size
are estimated once, and so are tables that are alike. Each proposal follows from a limit on the time
of a shard. Estimates, partitions and ratings are TorchRec's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import get_partition_by_type
from torchrec.distributed.planner.types import Enumerator, Proposer, Shard, ShardingOption
from torchrec.distributed.sharding_plan import calculate_shard_sizes_and_offsets
from torchrec.distributed.types import ModuleSharder, ShardingType

from torchrec_fmp.planning.estimates import copy_estimates, device_memory, populate
from torchrec_fmp.planning.shardable import ShardableTable, Sharders, shardable_tables

_KERNEL = EmbeddingComputeKernel.FUSED.value
_BY_COLUMNS = (
    ShardingType.COLUMN_WISE.value,
    ShardingType.TABLE_COLUMN_WISE.value,
    ShardingType.GRID_SHARD.value,
)
# TorchRec's `TableWiseEvaluator` prices lookups of narrower shards as if they were this wide.
_LEAST_COLUMNS = 32
_PROPOSALS = 4


@dataclass(frozen=True)
class Candidate:
    """One way to shard a table, with TorchRec's estimates.

    Args:
        sharding_type: TorchRec's name.
        columns: columns of a shard; None if the type does not split columns.
        shard_ms: time of the slowest shard, forward and backward.
        table_ms: time of all shards, added up.
        shard_bytes: bytes of the largest shard in the device's memory: weights, optimizer state,
            inputs and outputs.
        by_size: size -> estimated shard of that size.
    """

    sharding_type: str
    columns: int | None
    shard_ms: float
    table_ms: float
    shard_bytes: int = 0
    by_size: Mapping[tuple[int, ...], Shard] = field(
        default_factory=dict, repr=False, compare=False
    )


class ByTimeEnumerator(Enumerator):
    """Finds proposals and returns their sharding options, all with the fused kernel.

    Args:
        topology: topology of the ranks.
        batch_size: batch size on one rank.
        constraints: constraints of every table; only their pooling factors are used.
        sharding_types: TorchRec's names of the types to choose from. Columns are split into halves,
            quarters, and so on.
        shard_bytes: limit on the bytes of a shard in its device's memory. If every way to shard a
            table exceeds the limit, the way with the smallest shards is taken.
    """

    def __init__(
        self,
        topology: Topology,
        batch_size: int,
        constraints: dict[str, ParameterConstraints],
        sharding_types: Sequence[str],
        shard_bytes: float,
    ) -> None:
        self._topology = topology
        self._batch_size = batch_size
        self._constraints = constraints
        self._sharding_types = sharding_types
        self._shard_bytes = shard_bytes
        self._sharders: Sharders = ()
        self.proposals: list[list[ShardingOption]] = []

    def enumerate(
        self, module: nn.Module, sharders: list[ModuleSharder[Any]]
    ) -> list[ShardingOption]:
        """Returns the sharding options of all proposals; called by TorchRec's planner.

        Raises:
            ValueError: if a table's sharder offers none of the sharding types on the device.
        """
        self._sharders = sharders
        tables = {(table.path, table.name): table for table in shardable_tables(module, sharders)}
        alike: dict[object, list[Candidate]] = {}
        allowed = {}
        for key, table in tables.items():
            kind = (
                type(table.module),
                table.weight.shape,
                table.weight.dtype,
                table.optimizer,
                *self._pooling(table),
            )
            if kind not in alike:
                found = self.candidates(table)
                small = [one for one in found if one.shard_bytes <= self._shard_bytes]
                alike[kind] = small or [min(found, key=lambda one: one.shard_bytes)]
            allowed[key] = alike[kind]
        options: dict[object, ShardingOption] = {}
        self.proposals = []
        for choice in choices(allowed, self._topology.world_size):
            for key, chosen in choice.items():
                if (key, chosen) not in options:
                    options[key, chosen] = self._option(tables[key], chosen)
            self.proposals.append([options[pair] for pair in choice.items()])
        return list(options.values())

    def populate_estimates(self, sharding_options: list[ShardingOption]) -> None:
        """Estimates the options; called by some of TorchRec's proposers."""
        populate(sharding_options, self._topology, self._sharders, self._constraints)

    def candidates(self, table: ShardableTable) -> list[Candidate]:
        """Every way to shard a table, in the order of the sharding types.

        Raises:
            ValueError: if the table's sharder offers none of the sharding types on the device.
        """
        device = self._topology.compute_device
        sharder = next(s for s in self._sharders if s.module_type is type(table.module))
        offered = [
            name
            for name in sharder.sharding_types(device)
            if _KERNEL in sharder.compute_kernels(name, device)
        ]
        usable = [name for name in self._sharding_types if name in offered]
        if not usable:
            raise ValueError(
                f"table {table.name} cannot be sharded by any of {list(self._sharding_types)} on "
                f"{device}: choose from {offered}, which its sharder offers with kernel {_KERNEL}"
            )
        return [
            self._estimated(table, sharding_type, columns)
            for sharding_type in usable
            for columns in _columns(table.weight.shape[1], sharding_type)
        ]

    def _estimated(
        self, table: ShardableTable, sharding_type: str, columns: int | None
    ) -> Candidate:
        option = self._option(table, Candidate(sharding_type, columns, 0.0, 0.0))
        self.populate_estimates([option])
        every = [tuple(shard.size) for shard in option.shards]
        by_size = {tuple(shard.size): shard for shard in option.shards}
        ms = {size: shard.perf.total for size, shard in by_size.items() if shard.perf}
        memory = device_memory(self._topology)
        return Candidate(
            sharding_type,
            columns,
            shard_ms=max(ms.values()),
            table_ms=sum(ms[size] for size in every),
            shard_bytes=max(getattr(shard.storage, memory) for shard in by_size.values()),
            by_size=by_size,
        )

    def _option(self, table: ShardableTable, chosen: Candidate) -> ShardingOption:
        sizes, offsets = calculate_shard_sizes_and_offsets(
            table.weight,
            self._topology.world_size,
            self._topology.intra_group_size,
            chosen.sharding_type,
            chosen.columns,
        )
        shards = [
            Shard(size=size, offset=offset) for size, offset in zip(sizes, offsets, strict=True)
        ]
        copy_estimates(chosen.by_size, shards)
        return ShardingOption(
            name=table.name,
            tensor=table.priced_weight(),
            module=(table.path, table.module),
            input_lengths=self._pooling(table),
            batch_size=self._batch_size,
            sharding_type=chosen.sharding_type,
            partition_by=get_partition_by_type(chosen.sharding_type),
            compute_kernel=_KERNEL,
            shards=shards,
            is_pooled=table.is_pooled,
        )

    def _pooling(self, table: ShardableTable) -> list[float]:
        return self._constraints[table.name].pooling_factors


class ByTimeProposer(Proposer):
    """Makes the proposals that a `ByTimeEnumerator` found, one after the other."""

    def __init__(self) -> None:
        self._waiting: list[list[ShardingOption]] = []

    def load(
        self, search_space: list[ShardingOption], enumerator: Enumerator | None = None
    ) -> None:
        assert isinstance(enumerator, ByTimeEnumerator)
        self._waiting = list(enumerator.proposals)

    def propose(self) -> list[ShardingOption] | None:
        return self._waiting[0] if self._waiting else None

    def feedback(
        self,
        partitionable: bool,
        plan: list[ShardingOption] | None = None,
        perf_rating: float | None = None,
        storage_constraint: Topology | None = None,
    ) -> None:
        self._waiting.pop(0)


def choices(
    allowed: Mapping[Any, Sequence[Candidate]], world_size: int
) -> list[dict[Any, Candidate]]:
    """Table -> candidate, for each of a few limits on the time of a shard.

    Splitting a table makes its shards faster and their sum slower. Within a limit, each table takes
    the candidate with the least total time. Then no rank of a greedy partition takes longer than
    the mean rank plus the slowest shard (Graham, 1966, Bounds for certain multiprocessing
    anomalies). The lowest limit minimizes this bound. A greedy partition beats its bound when more
    tables are whole, so higher limits follow, up to the time of the mean rank.

    Args:
        allowed: table -> its candidates, at least one per table.
        world_size: number of ranks.
    """
    lowest, mean_ms, least = 0.0, 0.0, float("inf")
    taken: dict[Any, float] = {}
    total_ms = 0.0
    pairs = [(candidate, key) for key, found in allowed.items() for candidate in found]
    for candidate, key in sorted(pairs, key=lambda pair: pair[0].shard_ms):
        before = taken.get(key)
        if before is None or candidate.table_ms < before:
            taken[key] = candidate.table_ms
            total_ms += candidate.table_ms - (before or 0.0)
        bound = total_ms / world_size + candidate.shard_ms
        if len(taken) == len(allowed) and bound < least:
            lowest, mean_ms, least = candidate.shard_ms, total_ms / world_size, bound
    found_choices: list[dict[Any, Candidate]] = []
    limits = lowest * np.geomspace(1.0, max(1.0, mean_ms / lowest), _PROPOSALS)
    for limit in (lowest, *limits[1:]):
        choice = {key: _within(float(limit), found) for key, found in allowed.items()}
        if choice not in found_choices:
            found_choices.append(choice)
    return found_choices


def _within(limit: float, found: Sequence[Candidate]) -> Candidate:
    within = [candidate for candidate in found if candidate.shard_ms <= limit]
    return min(within, key=lambda candidate: candidate.table_ms)


def _columns(columns: int, sharding_type: str) -> Iterator[int | None]:
    """Columns of a shard: all, half, a quarter, and so on, where the type splits them."""
    if sharding_type not in _BY_COLUMNS:
        yield None
        return
    yield columns
    while columns % 2 == 0 and columns // 2 >= _LEAST_COLUMNS:
        columns //= 2
        yield columns
