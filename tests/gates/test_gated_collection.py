"""The sharded gated collection inside DistributedModelParallel, on real process groups."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel, get_unwrapped_module
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.types import ShardingType
from torchrec.fx import symbolic_trace
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from tests.support.gated_dlrm import (
    EBC,
    Case,
    Tensors,
    batches,
    build_model,
    local,
    optimizers,
    set_open,
    shard,
)
from tests.support.process_group import ProcessGroup
from torchrec_fmp.gates.attach import attach_gates, feature_gates
from torchrec_fmp.gates.feature_gates import GateConfig
from torchrec_fmp.gates.gated import GatedDense
from torchrec_fmp.gates.sharded import ShardedGatedEmbeddingBagCollection, sharders
from torchrec_fmp.gates.step_counter import StepCounter


def train(dmp: DistributedModelParallel, case: Case) -> list[Tensors]:
    """Loss, logits and non-fused gradients of each step."""
    optimizer = optimizers(dmp)
    steps = []
    for batch in batches(case):
        optimizer.zero_grad()
        loss, (_, logits, _) = dmp(batch)
        loss.backward()
        optimizer.step()
        grads = {n: p.grad.clone() for n, p in dmp.named_parameters() if p.grad is not None}
        steps.append(plain_names({"loss": loss.detach(), "logits": logits, **grads}))
    return steps


def plain_names(tensors: Mapping[str, Any]) -> Tensors:
    """Tensors under their names in the plain model, without the tensors of the gates."""
    return {
        name.replace("._embedding_bag_collection", "").replace("._module", ""): tensor
        for name, tensor in local(tensors).items()
        if ".gates." not in name and ".step." not in name
    }


def trained_with_open_gates(case: Case) -> dict[str, Tensors]:
    """Results of training, under the same keys for a plain and a gated model."""
    dmp = shard(case, build_model(case))
    set_open(dmp, True)
    steps = train(dmp, case)
    return {
        **{f"step {i}": step for i, step in enumerate(steps)},
        "weights": plain_names(dmp.state_dict()),
        "fused state": plain_names(dmp.fused_optimizer.state_dict()["state"]),
    }


CASES = [
    Case(sharding, pooling, weighted)
    for sharding in ("table_wise", "row_wise", "column_wise")
    for pooling, weighted in (
        (PoolingType.SUM, False),
        (PoolingType.SUM, True),
        (PoolingType.MEAN, False),
    )
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_open_gates_change_no_bit_of_three_training_steps(ranks: ProcessGroup, case: Case) -> None:
    plain = ranks.run(trained_with_open_gates, replace(case, gates=None))
    gated = ranks.run(trained_with_open_gates, case)
    for rank, (expected, computed) in enumerate(zip(plain, gated, strict=True)):
        for key in expected:
            where = f"rank {rank}, {key}"
            assert computed[key].keys() == expected[key].keys(), where
            for name, tensor in expected[key].items():
                assert torch.equal(computed[key][name], tensor), f"{where}, {name}"
    # The comparison must not be vacuous.
    assert any("sum" in name or "momentum" in name for name in plain[0]["fused state"])
    first, last = plain[0]["step 0"], plain[0]["step 2"]
    assert not torch.equal(first["logits"], last["logits"])


def spread(model: nn.Module) -> None:
    """Sets one gate closed, one open and two in between."""
    for _, gates in feature_gates(model):
        with torch.no_grad():
            gates.log_alpha.copy_(torch.tensor([-3.0, 0.7, 2.4, -1.0])[: len(gates.features)])


def outputs(model: nn.Module, batch: Batch) -> Tensors:
    """Pooled embeddings by key, whose order depends on the plan, and the logits."""
    collection = get_unwrapped_module(model).get_submodule(EBC)
    return {**collection(batch.sparse_features).to_dict(), "logits": model(batch)[1][1]}


def evaluated(case: Case) -> list[tuple[Tensors, Tensors]]:
    """Pooled embeddings and logits of two batches, of the sharded and the unsharded model."""
    whole = build_model(case).eval()
    spread(whole)
    dmp = shard(case, copy.deepcopy(whole)).eval()
    # On CPU the sharded tables start from new random weights.
    dmp.load_state_dict(whole.state_dict())
    results = []
    with torch.no_grad():
        for batch in batches(case, 2):
            results.append((outputs(dmp, batch), outputs(whole, batch)))
    counters = [m for m in dmp.modules() if isinstance(m, StepCounter)]
    assert [steps.value for steps in counters] == [0, 0]
    return results


@pytest.mark.parametrize("case", [*CASES, Case("mixed")], ids=str)
def test_evaluation_matches_the_unsharded_gated_model_and_counts_no_step(
    ranks: ProcessGroup, case: Case
) -> None:
    for results in ranks.run(evaluated, case):
        for sharded, unsharded in results:
            assert sharded.keys() == {"a", "b", "c", "d", "logits"}
            for name, tensor in unsharded.items():
                torch.testing.assert_close(sharded[name], tensor, rtol=0, atol=1e-6, msg=name)
            assert [name for name in "abcd" if not sharded[name].any()] == ["a"]


class Pooled(nn.Module):
    """Feature `b` is served by two tables."""

    def __init__(self) -> None:
        super().__init__()
        tables = [
            EmbeddingBagConfig(
                name=f"t{i}", embedding_dim=4 * (i + 1), num_embeddings=20, feature_names=features
            )
            for i, features in enumerate((["a", "b"], ["b", "c", "d"]))
        ]
        self.ebc = EmbeddingBagCollection(tables=tables)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        return self.ebc(features)


def pooled_by_two_tables() -> tuple[Tensors, Tensors]:
    """Pooled embeddings by key, of the sharded and the unsharded model."""
    torch.manual_seed(0)
    whole = attach_gates(Pooled(), GateConfig()).eval()
    spread(whole)
    dmp = DistributedModelParallel(copy.deepcopy(whole), sharders=sharders()).eval()
    dmp.load_state_dict(whole.state_dict())
    (batch,) = batches(Case("mixed"), 1)
    with torch.no_grad():
        sharded, unsharded = (model(batch.sparse_features) for model in (dmp, whole))
    return sharded.to_dict(), unsharded.to_dict()


def test_a_feature_of_two_tables_has_the_same_gate_in_both_when_sharded(
    ranks: ProcessGroup,
) -> None:
    for sharded, unsharded in ranks.run(pooled_by_two_tables):
        assert sharded.keys() == unsharded.keys() == {"a", "b@t0", "b@t1", "c", "d"}
        for key, tensor in unsharded.items():
            torch.testing.assert_close(sharded[key], tensor, rtol=0, atol=1e-6, msg=key)


def traced(case: Case) -> tuple[Tensor, Tensor]:
    """Logits of the sharded model and of its FX graph."""
    model = get_unwrapped_module(shard(case, build_model(case))).eval()
    leaves = [ShardedGatedEmbeddingBagCollection.__name__, GatedDense.__name__]
    graph = symbolic_trace(model, leaf_modules=leaves)
    (batch,) = batches(case, 1)
    with torch.no_grad():
        return model(batch)[1][1], graph(batch)[1][1]


def test_fx_traces_a_gated_model_with_its_gated_modules_as_leaves(ranks: ProcessGroup) -> None:
    for logits, from_graph in ranks.run(traced, Case("mixed")):
        assert torch.equal(logits, from_graph)


def planned(sharding_type: str) -> dict[str, str]:
    """Sharding type that the planner chooses for each table of a gated model."""
    world_size = dist.get_world_size()
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=world_size, compute_device="cpu"),
        constraints={
            f"t{i}": ParameterConstraints(sharding_types=[sharding_type]) for i in range(3)
        },
    )
    plan = planner.collective_plan(build_model(Case("mixed")), sharders(), dist.group.WORLD)
    return {table: sharding.sharding_type for table, sharding in plan.plan[EBC].items()}


@pytest.mark.parametrize(
    "sharding_type",
    [ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value, ShardingType.COLUMN_WISE.value],
)
def test_planner_places_the_tables_of_a_gated_collection(
    ranks_2: ProcessGroup, sharding_type: str
) -> None:
    for plan in ranks_2.run(planned, sharding_type):
        assert plan == dict.fromkeys(("t0", "t1", "t2"), sharding_type)
