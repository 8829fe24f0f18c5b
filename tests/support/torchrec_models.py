"""TorchRec's own test models, the cut rules that a user would write for them, and their batches.

torchrec/distributed/test_utils/test_model.py. `TestECSparseArch` is not here: its forward fails in
TorchRec itself, which hands an `EmbeddingCollection`'s dict to a function of `KeyedTensor`s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torch.optim import Optimizer
from torchrec.distributed.model_parallel import DistributedModelParallel, get_unwrapped_module
from torchrec.distributed.sharding_plan import (
    ParameterShardingGenerator,
    column_wise,
    construct_module_sharding_plan,
    row_wise,
    table_wise,
)
from torchrec.distributed.test_utils.test_model import (
    DENSE_LAYER_OUT_SIZE,
    ModelInput,
    TestMixedEmbeddingSparseArch,
    TestOverArch,
    TestOverArchLarge,
    TestOverArchRegroupModule,
    TestSparseNN,
)
from torchrec.distributed.types import ModuleSharder, ShardingPlan
from torchrec.modules.embedding_configs import (
    BaseEmbeddingConfig,
    EmbeddingBagConfig,
    EmbeddingConfig,
)
from torchrec.modules.regroup import KTRegroupAsDict

import torchrec_fmp as fmp
from torchrec_fmp.embeddings.collections import table_configs
from torchrec_fmp.selection.selection import FeatureDecision

BATCH_SIZE = 6
FLOATS = 10
# Positions that the mixed model pads every sequence to (TestMixedEmbeddingSparseArch).
POSITIONS = 20
# Table -> dimension and features.
Tables = Mapping[str, tuple[int, tuple[str, ...]]]
BAGS: Tables = {"t0": (8, ("a", "b")), "t1": (16, ("c",)), "t2": (4, ("d",))}
WEIGHTED: Tables = {"w0": (8, ("e",)), "w1": (4, ("f", "g"))}
SEQUENCES: Tables = {"s0": (8, ("r",)), "s1": (8, ("s", "u"))}


@dataclass(frozen=True)
class Case:
    """A model, and the placement of its tables before and after the prune.

    Args:
        over: type of the over arch of `TestSparseNN`; None selects the model with sequences too.
        before: sharding type of every table, or `mixed`.
        after: sharding type for the pruned model, or `mixed`.
        weighted: whether `TestSparseNN` has weighted tables.
        over_options: additional arguments of the over arch.
        model_type: `TestSparseNN` or a subclass.
    """

    over: type[nn.Module] | None = TestOverArch
    before: str = "mixed"
    after: str = "mixed"
    weighted: bool = True
    over_options: tuple[tuple[str, Any], ...] = ()
    model_type: type[TestSparseNN] = TestSparseNN

    def __str__(self) -> str:
        name = "TestMixedEmbeddingSparseArch" if self.over is None else self.over.__name__
        return f"{name}-{self.before}-{self.after}"

    @property
    def features(self) -> tuple[str, ...]:
        others = SEQUENCES if self.over is None else WEIGHTED if self.weighted else {}
        return tuple(f for _, names in [*BAGS.values(), *others.values()] for f in names)


def configs(tables: Tables, kind: type[BaseEmbeddingConfig]) -> list[Any]:
    return [
        kind(
            name=name,
            embedding_dim=dim,
            num_embeddings=11 + len(features),
            feature_names=list(features),
        )
        for name, (dim, features) in tables.items()
    ]


def build(case: Case) -> nn.Module:
    """The unsharded model; its weights are the same in every call."""
    torch.manual_seed(0)
    bags = configs(BAGS, EmbeddingBagConfig)
    if case.over is None:
        return TestMixedEmbeddingSparseArch(bags + configs(SEQUENCES, EmbeddingConfig), FLOATS)
    weighted = configs(WEIGHTED, EmbeddingBagConfig) if case.weighted else None
    return case.model_type(
        bags,
        FLOATS,
        weighted,
        over_arch_clazz=case.over,
        submodule_kwargs=dict(case.over_options),
    )


@fmp.cut_rule(TestSparseNN)
def cut_sparse_nn(model: TestSparseNN, fqn: str, cutter: fmp.Cutter) -> None:
    """Cuts both collections, the names that the over arch asks for, and its first layer."""
    sparse, over = model.sparse, model.over
    widths: dict[str, int] = {}
    gates: dict[str, float] = {}
    for name in ("ebc", "weighted_ebc"):
        if (collection := getattr(sparse, name)) is not None:
            for config in collection.embedding_bag_configs():
                widths |= dict.fromkeys(config.feature_names, config.embedding_dim)
            smaller, left = fmp.cut_tables(collection, fmp.join_fqn(fqn, f"sparse.{name}"), cutter)
            setattr(sparse, name, smaller)
            gates |= left
    if sparse.ebc is None:
        raise ValueError(f"{fqn}.sparse needs an unweighted feature and the selection has none")
    # The inputs after the embedded dense input, in order; only weighted features may be missing.
    groups = [model._embedding_names, model._weighted_features]
    blocks = [(name, widths[name]) for group in groups for name in group]
    groups = [[name for name in group if name in gates] for group in groups]
    model._embedding_names, model._weighted_features = groups
    if isinstance(over, TestOverArch):
        first = "dhn_arch.linear0"
        over._embedding_names, over._weighted_features = groups
    else:
        first = "overarch.0"
    if getattr(over, "regroup_module", None) is not None:
        over.regroup_module = KTRegroupAsDict(groups, ["unweighted", "weighted"])
    fmp.cut_linear(
        over.get_submodule(first),
        fmp.join_fqn(fqn, f"over.{first}"),
        cutter,
        *fmp.kept_columns([(None, DENSE_LAYER_OUT_SIZE), *blocks], gates),
    )


@fmp.cut_rule(TestMixedEmbeddingSparseArch)
def cut_mixed(model: TestMixedEmbeddingSparseArch, fqn: str, cutter: fmp.Cutter) -> None:
    """Cuts both collections and the layer that reads pooled features and padded sequences."""
    blocks: list[tuple[str | None, int]] = [(None, DENSE_LAYER_OUT_SIZE)]
    gates: dict[str, float] = {}
    for name, positions in (("ebc", 1), ("ec", POSITIONS)):
        if (collection := getattr(model, name)) is not None:
            for config in table_configs(collection):
                blocks += [(f, positions * config.embedding_dim) for f in config.feature_names]
            smaller, left = fmp.cut_tables(collection, fmp.join_fqn(fqn, name), cutter)
            setattr(model, name, smaller)
            gates |= left
    model._ebc_features = [name for name in model._ebc_features if name in gates]
    model._ec_features = [name for name in model._ec_features if name in gates]
    model._embedding_names = [name for name in model._embedding_names if name in gates]
    columns, scale = fmp.kept_columns(blocks, gates)
    linear = model.over.linear
    fmp.cut_linear(linear, fmp.join_fqn(fqn, "over.linear"), cutter, columns, scale)


@dataclass(frozen=True)
class Planner:
    """Places every table by this sharding type; `mixed` takes one after the other."""

    sharding: str

    def plan(self, module: nn.Module, sharders: list[ModuleSharder[Any]]) -> ShardingPlan:
        world_size = dist.get_world_size()
        by_type = {sharder.module_type: sharder for sharder in sharders}
        plan = {}
        for fqn, child in module.named_modules():
            sharder = by_type.get(type(child))
            # A gated collection is sharded as one, with the collection inside.
            if sharder is None or any(fqn.startswith(f"{done}.") for done in plan):
                continue
            tables = list(sharder.shardable_parameters(child))
            plan[fqn] = construct_module_sharding_plan(
                child,
                {table: self._sharding(i, world_size) for i, table in enumerate(tables)},
                sharder=sharder,
                local_size=world_size,
                world_size=world_size,
                device_type="cpu",
            )
        return ShardingPlan(plan)

    def _sharding(self, index: int, world_size: int) -> ParameterShardingGenerator:
        sharding = self.sharding
        if sharding == "mixed":
            sharding = ("row_wise", "table_wise", "column_wise")[index % 3]
        if sharding == "row_wise":
            return row_wise(compute_kernel="fused")
        if sharding == "column_wise":
            return column_wise(list(range(world_size)), compute_kernel="fused")
        return table_wise((index + 1) % world_size, compute_kernel="fused")


def shard(case: Case, gated: bool = True) -> tuple[DistributedModelParallel, Optimizer]:
    """The sharded model and the optimizer of its dense parameters and gates."""
    model = build(case)
    if gated:
        fmp.attach_gates(model)
    fused = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.1}
    sharders = fmp.sharders(fused)
    dmp = DistributedModelParallel(
        model,
        device=torch.device("cpu"),
        plan=Planner(case.before).plan(model, sharders),
        sharders=sharders,
    )
    dense = [p for p in dmp.parameters() if not hasattr(p, "_in_backward_optimizers")]
    return dmp, torch.optim.Adam(dense, lr=0.02)


def batch(step: int, case: Case) -> ModelInput:
    """This rank's batch of a step."""
    bags = configs(BAGS, EmbeddingBagConfig)
    sequences = configs(SEQUENCES, EmbeddingConfig) if case.over is None else []
    with torch.random.fork_rng():
        _, of_ranks = ModelInput.generate(
            BATCH_SIZE,
            dist.get_world_size(),
            FLOATS,
            bags + sequences,
            configs(WEIGHTED, EmbeddingBagConfig) if case.over and case.weighted else [],
            pooling_avg=3,
            random_seed=step,
        )
    return of_ranks[dist.get_rank()]


def train(dmp: nn.Module, optimizer: Optimizer, steps: Iterable[int], case: Case) -> list[float]:
    """Losses of the steps."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss, _ = dmp(batch(step, case))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def over_output(model: nn.Module, some: ModelInput) -> Tensor:
    """Output of the over arch, (B, 16); the model's own output, between 1 and 2, is too coarse."""
    bare = get_unwrapped_module(model)
    output: Tensor = bare.over(bare.dense(some.float_features), bare.sparse_forward(some))
    return output


@torch.no_grad()
def predictions(dmp: nn.Module, step: int, case: Case) -> Tensor:
    """The over arch's output in evaluation."""
    was_training = dmp.training
    dmp.eval()
    output = over_output(dmp, batch(step, case)).clone()
    dmp.train(was_training)
    return output


def select(case: Case, gates: Mapping[str, float]) -> fmp.Selection:
    """A selection with these gates; every other feature of the case stays as it is."""
    return fmp.Selection(
        {
            name: FeatureDecision(0.0, gates.get(name, 1.0), gates.get(name, 1.0) > 0, "test")
            for name in case.features
        }
    )


OVERS = (TestOverArch, TestOverArchRegroupModule, TestOverArchLarge)
