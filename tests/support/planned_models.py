"""Models to plan, on the meta device, and topologies."""

from __future__ import annotations

import logging

import torch
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from torchrec_fmp.gates.sharded import sharders as fmp_sharders
from torchrec_fmp.planning.shardable import Sharders

# Table -> rows, columns, features.
BAGS = {
    "t_a": (100_000, 64, ["a"]),
    "t_bc": (50_000, 32, ["b", "c"]),
    "t_d": (8_000, 64, ["d"]),
    "t_e": (400_000, 128, ["e"]),
}
BATCH_SIZE = 256
POOLING_FACTORS = {"t_a": [1.0], "t_bc": [2.0, 6.0], "t_d": [20.0], "t_e": [3.0]}


class Model(nn.Module):
    """A bag collection and, if asked for, a sequence collection."""

    def __init__(self, without: tuple[str, ...] = (), sequences: bool = False) -> None:
        super().__init__()
        meta = torch.device("meta")
        bags = {
            name: (rows, columns, [feature for feature in features if feature not in without])
            for name, (rows, columns, features) in BAGS.items()
        }
        self.bags = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=name, num_embeddings=rows, embedding_dim=columns, feature_names=features
                )
                for name, (rows, columns, features) in bags.items()
                if features
            ],
            device=meta,
        )
        if sequences:
            self.sequences = EmbeddingCollection(
                tables=[
                    EmbeddingConfig(
                        name="t_s", num_embeddings=1000, embedding_dim=16, feature_names=["s"]
                    )
                ],
                device=meta,
            )


def topology(
    world_size: int = 4, device: str = "cuda", local_world_size: int = 2, hbm: int = 2**30
) -> Topology:
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    return Topology(
        world_size=world_size,
        local_world_size=local_world_size,
        compute_device=device,
        hbm_cap=hbm,
    )


def sharders() -> Sharders:
    return [*fmp_sharders(), EmbeddingCollectionSharder()]


def constraints(types: dict[str, str] | None = None) -> dict[str, ParameterConstraints]:
    return {
        table: ParameterConstraints(
            sharding_types=[types[table]] if types else None,
            pooling_factors=list(factors),
        )
        for table, factors in POOLING_FACTORS.items()
    }


def planner(
    where: Topology, given: dict[str, ParameterConstraints] | None = None
) -> EmbeddingShardingPlanner:
    return EmbeddingShardingPlanner(
        topology=where,
        batch_size=BATCH_SIZE,
        constraints=constraints() if given is None else given,
        storage_reservation=FixedPercentageStorageReservation(0.1),
        debug=False,
        stats=[],
    )
