"""The manifest: a prune's account of its changes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    ParameterSharding,
    ShardingPlan,
)

from tests.support.selections import select
from torchrec_fmp.pruning.manifest import BeforeAfter, Manifest


def plan(**shardings: ParameterSharding) -> ShardingPlan:
    return ShardingPlan({"ebc": EmbeddingModuleShardingPlan(shardings)})


MANIFEST = Manifest(
    selection=select(a=0, b=0.5, x=0, y=1),
    dense_columns={"dense_arch": ("y",)},
    tables=BeforeAfter((2, 1)),
    table_bytes=BeforeAfter((96, 64)),
    parameters=BeforeAfter((40, 30)),
    plans=BeforeAfter(
        (
            plan(
                t_a=ParameterSharding("table_wise", "fused", [1]),
                t_b=ParameterSharding("row_wise", "fused", [0, 1]),
            ),
            plan(t_b=ParameterSharding("table_wise", "fused", [0])),
        )
    ),
    estimates=None,
    comparison=None,
    link_bytes=np.array([[5, 2], [11, 7]]),
    staging="none",
)


def test_bytes_on_the_diagonal_count_as_copied_not_moved() -> None:
    assert MANIFEST.moved_bytes == 13
    assert MANIFEST.describe()["copied_bytes"] == 12


def test_the_description_is_plain_data_with_everything_except_the_decisions() -> None:
    described = replace(MANIFEST, parity_max_abs=2e-7).describe()
    assert json.loads(json.dumps(described)) == {
        "dropped": ["a", "x"],
        "dense_columns": {"dense_arch": ["y"]},
        "tables": {"before": 2, "after": 1},
        "table_bytes": {"before": 96, "after": 64},
        "parameters": {"before": 40, "after": 30},
        "plans": {
            "before": {
                "t_a": {"sharding_type": "table_wise", "compute_kernel": "fused", "ranks": [1]},
                "t_b": {"sharding_type": "row_wise", "compute_kernel": "fused", "ranks": [0, 1]},
            },
            "after": {
                "t_b": {"sharding_type": "table_wise", "compute_kernel": "fused", "ranks": [0]}
            },
        },
        "estimates": None,
        "comparison": None,
        "moved_bytes": 13,
        "copied_bytes": 12,
        "staging": "none",
        "parity_max_abs": 2e-7,
    }


def test_parity_is_none_without_a_comparison() -> None:
    assert MANIFEST.describe()["parity_max_abs"] is None
