"""The sharded gated collection inside DistributedModelParallel, on real process groups."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec.datasets.utils import Batch
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel, get_unwrapped_module
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    row_wise,
    table_wise,
)
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from torchrec.distributed.types import ShardedTensor, ShardingPlan, ShardingType
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from tests.distributed.process_group import ProcessGroup
from torchrec_fmp.gates.attach import attach_gates, feature_gates, gate_optimizer
from torchrec_fmp.gates.feature_gates import GateConfig
from torchrec_fmp.gates.sharded import ShardedGatedEmbeddingBagCollection, sharders

EBC = "model.sparse_arch.embedding_bag_collection"
BATCH_SIZE = 6
STEPS = 3
DENSE = ("x", "y")
Sharding = Literal["table_wise", "row_wise", "column_wise", "mixed"]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A model, its plan and its gates; table `t0` serves two features."""

    sharding: Sharding
    pooling: PoolingType = PoolingType.SUM
    weighted: bool = False
    gates: GateConfig | None = field(default_factory=GateConfig)

    def __str__(self) -> str:
        return f"{self.sharding}-{self.pooling.name}-{'' if self.weighted else 'un'}weighted"


def build_model(case: Case) -> DLRMTrain:
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(
            name=f"t{i}",
            embedding_dim=8,
            num_embeddings=20 + i,
            feature_names=features,
            pooling=case.pooling,
        )
        for i, features in enumerate((["a", "b"], ["c"], ["d"]))
    ]
    collection = EmbeddingBagCollection(tables=tables, is_weighted=case.weighted)
    model = DLRMTrain(DLRM(collection, len(DENSE), [16, 8], [8, 1]))
    if case.gates is not None:
        attach_gates(model, case.gates, {"model.dense_arch": DENSE})
    return model


def shard(case: Case, model: DLRMTrain) -> DistributedModelParallel:
    world_size = dist.get_world_size()
    all_sharders = sharders(
        {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.1}
    )
    kernel = EmbeddingComputeKernel.FUSED.value
    by_table = [table_wise(rank=i % world_size, compute_kernel=kernel) for i in range(3)]
    by_row = [row_wise(compute_kernel=kernel)] * 3
    by_column = [column_wise(list(range(world_size)), compute_kernel=kernel)] * 3
    shardings = {
        "table_wise": by_table,
        "row_wise": by_row,
        "column_wise": by_column,
        "mixed": [by_table[0], by_row[1], by_column[2]],
    }[case.sharding]
    plan = construct_module_sharding_plan(
        model.get_submodule(EBC),
        {f"t{i}": sharding for i, sharding in enumerate(shardings)},
        sharder=all_sharders[0] if case.gates is not None else all_sharders[1],
        local_size=world_size,
        world_size=world_size,
        device_type="cpu",
    )
    return DistributedModelParallel(
        model, device=torch.device("cpu"), plan=ShardingPlan({EBC: plan}), sharders=all_sharders
    )


def optimizers(dmp: DistributedModelParallel) -> CombinedOptimizer:
    """TorchRec's fused and dense optimizers, and the gates' own where there are gates."""
    dense = {
        name: parameter
        for name, parameter in in_backward_optimizer_filter(dmp.named_parameters())
        if not name.endswith("log_alpha")
    }
    keyed = [
        dmp.fused_optimizer,
        KeyedOptimizerWrapper(dense, lambda parameters: torch.optim.Adagrad(parameters, lr=0.05)),
    ]
    if any(feature_gates(dmp)):
        gates = gate_optimizer(dmp, 0.2)
        named = {f"{fqn}.log_alpha": module.log_alpha for fqn, module in feature_gates(dmp)}
        keyed.append(KeyedOptimizerWrapper(named, lambda _: gates))
    return CombinedOptimizer(keyed)


def batches(case: Case, count: int = STEPS) -> Iterator[Batch]:
    """Every rank has its own."""
    generator = torch.Generator().manual_seed(1000 + dist.get_rank())
    for _ in range(count):
        lengths = torch.randint(0, 4, (4 * BATCH_SIZE,), generator=generator)
        total = int(lengths.sum())
        yield Batch(
            dense_features=torch.randn(BATCH_SIZE, len(DENSE), generator=generator),
            sparse_features=KeyedJaggedTensor(
                keys=["d", "b", "a", "c"],
                values=torch.randint(0, 20, (total,), generator=generator),
                lengths=lengths,
                weights=torch.rand(total, generator=generator) if case.weighted else None,
            ),
            labels=torch.randint(0, 2, (BATCH_SIZE,), generator=generator),
        )


def train(dmp: DistributedModelParallel, case: Case) -> list[Tensors]:
    """Loss, logits and the gradients that are not fused, of each step."""
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
    """The gated model's names as the plain model has them; the gates' own stay away."""
    return {
        name.replace("._embedding_bag_collection", "").replace("._module", ""): tensor
        for name, tensor in local(tensors).items()
        if ".gates." not in name
    }


def local(state: Mapping[str, Any]) -> Tensors:
    """This rank's part of every tensor of a nested state, by path."""
    tensors: Tensors = {}
    for name, value in state.items():
        if isinstance(value, ShardedTensor):
            for shard in value.local_shards():
                tensors[f"{name}{shard.metadata.shard_offsets}"] = shard.tensor.clone()
        elif isinstance(value, Mapping):
            tensors |= local({f"{name}/{key}": inner for key, inner in value.items()})
        elif isinstance(value, Tensor):
            tensors[str(name)] = value.detach().clone()
    return tensors


def set_open(model: nn.Module, is_open: bool) -> None:
    for _, gates in feature_gates(model):
        gates.set_open(is_open)


def trained_with_open_gates(case: Case) -> dict[str, Tensors]:
    """What a plain and a gated model did, under the same keys."""
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


@pytest.fixture(params=[1, 2], ids=["1 rank", "2 ranks"])
def ranks(request: pytest.FixtureRequest) -> ProcessGroup:
    return request.getfixturevalue(f"ranks_{request.param}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_open_gates_change_no_bit_of_three_training_steps(
    ranks: ProcessGroup, case: Case
) -> None:
    plain = ranks.run(trained_with_open_gates, replace(case, gates=None))
    gated = ranks.run(trained_with_open_gates, case)
    for rank, (expected, computed) in enumerate(zip(plain, gated, strict=True)):
        for key in expected:
            where = f"rank {rank}, {key}"
            assert computed[key].keys() == expected[key].keys(), where
            for name, tensor in expected[key].items():
                assert torch.equal(computed[key][name], tensor), f"{where}, {name}"
    # The comparison must have had something to compare.
    assert any("sum" in name or "momentum" in name for name in plain[0]["fused state"])
    first, last = plain[0]["step 0"], plain[0]["step 2"]
    assert not torch.equal(first["logits"], last["logits"])


def spread(model: nn.Module) -> None:
    """A closed gate, an open one and two between."""
    for _, gates in feature_gates(model):
        with torch.no_grad():
            gates.log_alpha.copy_(torch.tensor([-3.0, 0.7, 2.4, -1.0])[: len(gates.features)])


def outputs(model: nn.Module, batch: Batch) -> Tensors:
    """Pooled embeddings by key, whose order depends on the plan, and the logits."""
    collection = get_unwrapped_module(model).get_submodule(EBC)
    return {**collection(batch.sparse_features).to_dict(), "logits": model(batch)[1][1]}


def evaluated(case: Case) -> list[tuple[Tensors, Tensors]]:
    """Pooled embeddings and logits of two batches: of the sharded model, and of the unsharded."""
    whole = build_model(case).eval()
    spread(whole)
    dmp = shard(case, copy.deepcopy(whole)).eval()
    # On CPU the sharded tables start from new random weights.
    dmp.load_state_dict(whole.state_dict())
    results = []
    with torch.no_grad():
        for batch in batches(case, 2):
            results.append((outputs(dmp, batch), outputs(whole, batch)))
    assert [gates.step.item() for _, gates in feature_gates(dmp)] == [0, 0]
    return results


@pytest.mark.parametrize("case", [*CASES, Case("mixed")], ids=str)
def test_evaluation_equals_that_of_the_unsharded_gated_model_and_counts_no_step(
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
    """By key, of the sharded model and of the unsharded."""
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


def trained_gates(case: Case) -> tuple[Tensors, Tensors, list[Tensors]]:
    """log_alpha after training, the noise of the last step, and the steps."""
    dmp = shard(case, build_model(case))
    steps = train(dmp, case)
    gates = dict(feature_gates(dmp))
    assert [module.step.item() for module in gates.values()] == [STEPS, STEPS]
    log_alphas = {fqn: module.log_alpha.detach().clone() for fqn, module in gates.items()}
    noise = {fqn: module(STEPS, BATCH_SIZE).detach() for fqn, module in gates.items()}
    return log_alphas, noise, steps


@pytest.mark.parametrize("sampling", ["batch", "example"])
def test_log_alpha_is_equal_on_all_ranks_although_their_noise_differs(
    ranks_2: ProcessGroup, sampling: Literal["batch", "example"]
) -> None:
    config = GateConfig(sampling=sampling)
    case = Case("mixed", gates=config)
    (log_alphas, noise, _), (other_log_alphas, other_noise, _) = ranks_2.run(trained_gates, case)
    assert len(log_alphas) == 2
    for fqn, log_alpha in log_alphas.items():
        assert torch.equal(log_alpha, other_log_alphas[fqn])
        assert (log_alpha != config.initial_log_alpha).all()
        assert not torch.equal(noise[fqn], other_noise[fqn])


def test_sampled_gates_train_alike_in_every_run(ranks_2: ProcessGroup) -> None:
    case = Case("mixed")
    for first, second in zip(
        ranks_2.run(trained_gates, case), ranks_2.run(trained_gates, case), strict=True
    ):
        assert torch.equal(first[0][f"{EBC}.gates"], second[0][f"{EBC}.gates"])
        for step, again in zip(first[2], second[2], strict=True):
            assert torch.equal(step["logits"], again["logits"])


def trained_through_warm_up(case: Case) -> list[Tensors]:
    """One step with open gates, then sampled ones."""
    dmp = shard(case, build_model(case))
    optimizer = optimizers(dmp)
    values = []
    for step, batch in enumerate(batches(case)):
        set_open(dmp, step == 0)
        optimizer.zero_grad()
        dmp(batch)[0].backward()
        optimizer.step()
        values.append({fqn: gates.log_alpha.detach().clone() for fqn, gates in feature_gates(dmp)})
    return values


def test_gates_start_to_move_only_when_the_warm_up_ends(ranks: ProcessGroup) -> None:
    for first, *rest in ranks.run(trained_through_warm_up, Case("mixed")):
        for fqn, log_alpha in first.items():
            assert (log_alpha == GateConfig().initial_log_alpha).all()
            assert all((later[fqn] != log_alpha).all() for later in rest)


def resumed(case: Case) -> tuple[Tensors, Tensors]:
    """State after STEPS steps in one model, and after moving into another before the last."""
    straight, interrupted = (shard(case, build_model(case)) for _ in range(2))
    run_steps(straight, optimizers(straight), list(batches(case)))
    optimizer = optimizers(interrupted)
    run_steps(interrupted, optimizer, list(batches(case))[:-1])
    continued = shard(case, build_model(case))
    with torch.no_grad():
        next(iter(feature_gates(continued)))[1].log_alpha.fill_(0.25)
    continued.load_state_dict(interrupted.state_dict())
    next_optimizer = optimizers(continued)
    for _, keyed in next_optimizer.optimizers:
        # A fresh optimizer has no state to load into.
        if isinstance(keyed, KeyedOptimizerWrapper):
            keyed.init_state()
    next_optimizer.load_state_dict(optimizer.state_dict())
    run_steps(continued, next_optimizer, list(batches(case))[-1:])
    return local(straight.state_dict()), local(continued.state_dict())


def run_steps(
    dmp: DistributedModelParallel, optimizer: CombinedOptimizer, some: list[Batch]
) -> None:
    for batch in some:
        optimizer.zero_grad()
        dmp(batch)[0].backward()
        optimizer.step()


def test_state_dict_carries_gates_and_their_step_to_another_model(ranks: ProcessGroup) -> None:
    for straight, continued in ranks.run(resumed, Case("mixed")):
        assert {f"{EBC}.gates.log_alpha", f"{EBC}.gates.step"} <= straight.keys()
        assert continued.keys() == straight.keys()
        # Weights and the fused state move with TorchRec's own state dicts.
        for name, tensor in straight.items():
            assert torch.equal(continued[name], tensor), name


def by_loop(dmp: DistributedModelParallel, case: Case) -> None:
    run_steps(dmp, optimizers(dmp), list(batches(case, 5)))


def by_base_pipeline(dmp: DistributedModelParallel, case: Case) -> None:
    drain(TrainPipelineBase(dmp, optimizers(dmp), torch.device("cpu")), batches(case, 5))


def by_sparse_dist_pipeline(dmp: DistributedModelParallel, case: Case) -> None:
    pipeline = TrainPipelineSparseDist(dmp, optimizers(dmp), torch.device("cpu"))
    drain(pipeline, batches(case, 5))
    # The pipeline traces the model and takes over the collections that it finds.
    assert [type(module) for module in pipeline._pipelined_modules] == [
        ShardedGatedEmbeddingBagCollection
    ]


def drain(pipeline: TrainPipelineBase | TrainPipelineSparseDist, source: Iterator[Batch]) -> None:
    steps = 0
    try:
        while True:
            pipeline.progress(source)
            steps += 1
    except StopIteration:
        assert steps == 5


def state_after(train_by: Callable[[DistributedModelParallel, Case], None], case: Case) -> Tensors:
    dmp = shard(case, build_model(case))
    train_by(dmp, case)
    fused = dmp.fused_optimizer.state_dict()["state"]
    return local(dmp.state_dict()) | local({"fused": fused})


@pytest.mark.parametrize("sampling", ["batch", "example"])
@pytest.mark.parametrize("pipeline", [by_base_pipeline, by_sparse_dist_pipeline])
def test_torchrecs_pipelines_end_bit_equal_to_a_plain_loop(
    ranks: ProcessGroup,
    pipeline: Callable[[DistributedModelParallel, Case], None],
    sampling: Literal["batch", "example"],
) -> None:
    case = Case("mixed", gates=GateConfig(sampling=sampling))
    for expected, computed in zip(
        ranks.run(state_after, by_loop, case), ranks.run(state_after, pipeline, case), strict=True
    ):
        assert expected.keys() == computed.keys()
        assert expected[f"{EBC}.gates.step"].item() == 5
        for name, tensor in expected.items():
            assert torch.equal(computed[name], tensor), name


def planned(sharding_type: str) -> dict[str, str]:
    """The planner's sharding type of each table of a gated model."""
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
