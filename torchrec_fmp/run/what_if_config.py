"""A model and a cluster described in YAML, for planning without either."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.proposers import GreedyProposer
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_fmp.gates.sharded import sharders
from torchrec_fmp.planning.by_time import ByTimeEnumerator, ByTimeProposer
from torchrec_fmp.planning.estimates import device_memory
from torchrec_fmp.planning.shardable import Sharders, shardable_tables
from torchrec_fmp.strict import Loader, check_positive, nearest

_GIB = 2**30
_OPTIMIZERS = {
    "sgd": EmbOptimType.EXACT_SGD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adam": EmbOptimType.ADAM,
}


@dataclass(frozen=True)
class TopologyConfig:
    """Configuration of the ranks.

    Args:
        world_size: number of ranks.
        local_world_size: number of ranks on one host; by default all.
        device: device of the tables.
        hbm_gib: memory of a GPU.
        ddr_gib: memory of the host for each rank.
        intra_host_gib_per_s: bandwidth of a rank to others on its host.
        inter_host_gib_per_s: bandwidth of a rank to other hosts.
    """

    world_size: int = 1
    local_world_size: int | None = None
    device: Literal["cuda", "cpu"] = "cuda"
    hbm_gib: float = 80.0
    ddr_gib: float = 128.0
    intra_host_gib_per_s: float = 600.0
    inter_host_gib_per_s: float = 12.5

    def __post_init__(self) -> None:
        names = ("world_size", "hbm_gib", "ddr_gib", "intra_host_gib_per_s", "inter_host_gib_per_s")
        check_positive(self, "topology", *names)
        local = self.local_world_size
        if local is not None and (local < 1 or self.world_size % local):
            raise ValueError(
                f"topology.local_world_size is {local}; it must divide the "
                f"world_size {self.world_size}"
            )

    def build(self) -> Topology:
        """TorchRec's topology."""
        return Topology(
            world_size=self.world_size,
            local_world_size=self.local_world_size,
            compute_device=self.device,
            hbm_cap=int(self.hbm_gib * _GIB),
            ddr_cap=int(self.ddr_gib * _GIB),
            # TorchRec counts in bytes per millisecond.
            intra_host_bw=self.intra_host_gib_per_s * _GIB / 1000,
            inter_host_bw=self.inter_host_gib_per_s * _GIB / 1000,
        )


@dataclass(frozen=True)
class SearchConfig:
    """How far TorchRec's planner searches; docs/planning.md says what each search takes.

    Args:
        search: kind of search. `by_time` lets TorchRec's planner choose among a few proposals, made
            of the fused kernel and of few estimates. `greedy` lets TorchRec's greedy proposer
            choose among all types and kernels. `full` runs TorchRec's four default proposers.
        sharding_types: sharding types to choose from, by TorchRec's names.
        shard_fraction: fraction of a rank's memory that a shard may take with `by_time`.
        reserved_fraction: fraction of a rank's memory for everything that is not a table.
    """

    search: Literal["by_time", "greedy", "full"] = "by_time"
    sharding_types: Sequence[str] = (
        ShardingType.TABLE_WISE.value,
        ShardingType.COLUMN_WISE.value,
        ShardingType.TABLE_ROW_WISE.value,
        ShardingType.ROW_WISE.value,
        ShardingType.GRID_SHARD.value,
    )
    shard_fraction: float = 0.25
    reserved_fraction: float = 0.15

    def __post_init__(self) -> None:
        known = [sharding_type.value for sharding_type in ShardingType]
        unknown = [name for name in self.sharding_types if name not in known]
        if unknown or not self.sharding_types:
            raise ValueError(f"planner.sharding_types has {unknown}; TorchRec has {known}")
        for name in ("shard_fraction", "reserved_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"planner.{name} is {getattr(self, name)}; it must be in (0, 1)")


@dataclass(frozen=True)
class TableGroup:
    """A group of identical tables.

    Table 3 of the group `ads` is `t_ads_3`. Its feature is `ads_3`; if the table serves several
    features, they are `ads_3_0`, `ads_3_1`, ...

    Args:
        count: number of tables.
        rows: number of rows of each table.
        dim: dimension of each row.
        pooling: mean number of ids of each feature in a row of data.
        features_per_table: number of features that share a table.
        data_type: data type of the weights.
    """

    count: int
    rows: int
    dim: int
    pooling: float = 1.0
    features_per_table: int = 1
    data_type: Literal["fp32", "fp16", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        names = ("count", "rows", "dim", "pooling", "features_per_table")
        check_positive(self, "a group's", *names)

    def tables(self, name: str, fraction: float) -> list[EmbeddingBagConfig]:
        """The first tables of the group, as many as `fraction` says and at least one."""
        return [
            EmbeddingBagConfig(
                name=f"t_{name}_{i}",
                num_embeddings=self.rows,
                embedding_dim=self.dim,
                feature_names=self._features(f"{name}_{i}"),
                data_type=DataType[self.data_type.upper()],
            )
            for i in range(max(1, round(self.count * fraction)))
        ]

    def _features(self, stem: str) -> list[str]:
        count = self.features_per_table
        return [stem] if count == 1 else [f"{stem}_{j}" for j in range(count)]


@dataclass(frozen=True)
class WhatIfConfig:
    """A model, a cluster, and how to plan the model on the cluster.

    Args:
        groups: name -> group of identical tables.
        topology: ranks of the cluster.
        planner: extent of the search by TorchRec's planner.
        batch_size: rows of data on each rank.
        optimizer: fused optimizer of all tables.
        steps_left: training steps remaining after the prune; None is treated as unlimited.
        table_fraction: fraction of each group's tables to plan, for a quick look; the rest is left
            out.
    """

    groups: dict[str, TableGroup]
    topology: TopologyConfig = field(default_factory=TopologyConfig)
    planner: SearchConfig = field(default_factory=SearchConfig)
    batch_size: int = 4096
    optimizer: Literal["sgd", "adagrad", "rowwise_adagrad", "adam"] = "rowwise_adagrad"
    steps_left: int | None = None
    table_fraction: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self, "the what-if's", "batch_size", "table_fraction")
        if self.table_fraction > 1:
            raise ValueError(f"table_fraction is {self.table_fraction}; it must be at most 1")
        if not self.groups:
            raise ValueError("groups is empty; a model needs at least one group of tables")

    def features(self) -> dict[str, list[str]]:
        """Group -> its features."""
        return {
            name: [
                feature
                for table in group.tables(name, self.table_fraction)
                for feature in table.feature_names
            ]
            for name, group in self.groups.items()
        }

    def sharders(self) -> Sharders:
        return sharders({"optimizer": _OPTIMIZERS[self.optimizer]})

    def build(self, dropped: Sequence[str] = ()) -> nn.Module:
        """The tables on meta, without dropped features and the tables that serve only them."""
        gone = set(dropped)
        tables = []
        for name, group in self.groups.items():
            for table in group.tables(name, self.table_fraction):
                table.feature_names = [f for f in table.feature_names if f not in gone]
                if table.feature_names:
                    tables.append(table)
        if not tables:
            raise ValueError("every feature is dropped; at least one must be kept")
        collection = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
        return nn.ModuleDict({"embedding_bag_collection": collection})

    def build_planner(self, model: nn.Module) -> EmbeddingShardingPlanner:
        """TorchRec's planner for the model, before or after features are dropped."""
        topology, search = self.topology.build(), self.planner
        by_time = search.search == "by_time"
        constraints = {
            table.name: ParameterConstraints(
                sharding_types=list(search.sharding_types),
                pooling_factors=[self._group_of(table.name).pooling] * len(table.features),
            )
            for table in shardable_tables(model, self.sharders())
        }
        proposers = {"by_time": [ByTimeProposer()], "greedy": [GreedyProposer()], "full": None}
        return EmbeddingShardingPlanner(
            topology=topology,
            batch_size=self.batch_size,
            constraints=constraints,
            enumerator=self._enumerator(topology, constraints) if by_time else None,
            proposer=proposers[search.search],
            storage_reservation=FixedPercentageStorageReservation(search.reserved_fraction),
            debug=False,
            stats=[],
        )

    def _enumerator(
        self, topology: Topology, constraints: dict[str, ParameterConstraints]
    ) -> ByTimeEnumerator:
        capacity = getattr(topology.devices[0].storage, device_memory(topology))
        shard_bytes = self.planner.shard_fraction * capacity
        return ByTimeEnumerator(
            topology, self.batch_size, constraints, self.planner.sharding_types, shard_bytes
        )

    def _group_of(self, table: str) -> TableGroup:
        return self.groups[table.removeprefix("t_").rpartition("_")[0]]


def load_what_if(path: str, overrides: Sequence[str] = ()) -> WhatIfConfig:
    """Reads a YAML file and applies overrides such as `--topology.world_size 256`.

    Raises:
        ConfigError: for unknown options, wrong types or values, and keys given twice.
        FileNotFoundError: if there is no such file.
    """
    config, _ = Loader(WhatIfConfig, "torchrec-fmp plan").load(path, overrides)
    return config


def check_known(names: Sequence[str], known: Sequence[str]) -> None:
    """Raises ValueError for a feature that the model does not have."""
    everything = set(known)
    for name in names:
        if name not in everything:
            hint = "".join(f" Did you mean '{near}'?" for near in nearest(name, known))
            raise ValueError(f"the model has no feature '{name}'.{hint}")
