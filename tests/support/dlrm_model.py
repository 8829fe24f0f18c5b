"""A small DLRM to prune: its tables, plans and batches, and a rank's pieces of it.

Functions that need a process group run on the ranks; `assemble` puts together what they return.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torch.optim import Optimizer
from torchrec.datasets.utils import Batch
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel, get_unwrapped_module
from torchrec.distributed.sharding_plan import (
    ParameterShardingGenerator,
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ModuleSharder, ShardingPlan
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_fmp.embeddings.local_shards import local_shards, sharded_collections
from torchrec_fmp.gates.attach import attach_gates, feature_gates
from torchrec_fmp.gates.feature_gates import GateConfig
from torchrec_fmp.gates.sharded import sharders
from torchrec_fmp.selection.selection import FeatureDecision, Selection

DIM = 16
BATCH_SIZE = 8
DENSE = ("x", "y", "z")
# Table -> its rows and features: uneven rows, fewer rows than ranks, and a shared table.
TABLES: dict[str, tuple[int, tuple[str, ...]]] = {
    "t_seven": (7, ("a",)),
    "t_one": (1, ("b",)),
    "t_shared": (20, ("c", "d")),
    "t_last": (13, ("e",)),
}
FEATURES = tuple(feature for _, features in TABLES.values() for feature in features)
MIXED = {
    "t_seven": "row_wise",
    "t_one": "table_wise",
    "t_shared": "column_wise",
    "t_last": "row_wise",
}
MIXTURES = {"mixed": MIXED, "mixed_and_replicated": {**MIXED, "t_last": "data_parallel"}}
SHARDINGS = ("table_wise", "row_wise", "column_wise")

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A model and the first placement of its tables.

    Args:
        sharding: sharding type of every table, or one of `MIXTURES`.
        gated: whether features have gates.
        dense_gates: whether dense columns have gates too.
        root: whether the root module is DLRM itself instead of DLRMTrain.
        optimizer: fused optimizer.
        in_backward: optimizer class set by `apply_optimizer_in_backward` instead.
        rows: number of rows of every table, instead of the default ones.
        model_type: DLRM or a subclass.
        features: sparse features that the model is built with.
        dense: dense columns that the model is built with.
        device: device that the tables are built on; `meta` avoids building them twice.
        data_type: data type of the tables.
        kernel: compute kernel of the tables, unless they are data-parallel.
    """

    sharding: str = "mixed"
    gated: bool = True
    dense_gates: bool = True
    root: bool = False
    optimizer: EmbOptimType = EmbOptimType.EXACT_ROWWISE_ADAGRAD
    in_backward: type[Optimizer] | None = None
    rows: int | None = None
    model_type: type[DLRM] = DLRM
    features: tuple[str, ...] = FEATURES
    dense: tuple[str, ...] = DENSE
    device: str = "cpu"
    data_type: DataType = DataType.FP32
    kernel: str = EmbeddingComputeKernel.FUSED.value


@dataclass(frozen=True)
class FixedPlanner:
    """A planner with a fixed plan.

    Args:
        sharding: sharding type of every table, or one of `MIXTURES`.
        first_rank: rank of the first table-wise table; the others follow.
        kernel: compute kernel of every table that is not data-parallel.
    """

    sharding: str = "mixed"
    first_rank: int = 0
    kernel: str = EmbeddingComputeKernel.FUSED.value

    def plan(self, module: nn.Module, sharders: list[ModuleSharder[Any]]) -> ShardingPlan:
        world_size = dist.get_world_size()
        by_type = {sharder.module_type: sharder for sharder in sharders}
        plan = {}
        for fqn, child in module.named_modules():
            sharder = by_type.get(type(child))
            # A gated collection is sharded as one, with the collection inside.
            if sharder is None or any(fqn.startswith(f"{done}.") for done in plan):
                continue
            plan[fqn] = construct_module_sharding_plan(
                child,
                {c.name: self._sharding(c.name, world_size) for c in child.embedding_bag_configs()},
                sharder=sharder,
                local_size=world_size,
                world_size=world_size,
                device_type="cpu",
            )
        return ShardingPlan(plan)

    def _sharding(self, table: str, world_size: int) -> ParameterShardingGenerator:
        kernel = self.kernel
        rank = (list(TABLES).index(table) + self.first_rank) % world_size
        sharding = MIXTURES.get(self.sharding, {}).get(table, self.sharding)
        if sharding == "table_wise":
            return table_wise(rank=rank, compute_kernel=kernel)
        if sharding == "row_wise":
            return row_wise(compute_kernel=kernel)
        if sharding == "column_wise":
            return column_wise(ranks=list(range(world_size)), compute_kernel=kernel)
        return data_parallel()


def build(case: Case) -> nn.Module:
    """The unsharded model; its weights are the same in every call."""
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(
            name=name,
            embedding_dim=DIM,
            num_embeddings=case.rows or rows,
            feature_names=[feature for feature in features if feature in case.features],
            data_type=case.data_type,
        )
        for name, (rows, features) in TABLES.items()
    ]
    collection = EmbeddingBagCollection(
        tables=[table for table in tables if table.feature_names],
        device=torch.device(case.device),
    )
    if case.in_backward is not None:
        apply_optimizer_in_backward(case.in_backward, collection.parameters(), {"lr": 0.1})
    model: nn.Module = case.model_type(collection, len(case.dense), [12, DIM], [10, 1])
    dense_arch = "dense_arch"
    if not case.root:
        model, dense_arch = DLRMTrain(model), "model.dense_arch"
    if case.gated:
        attach_gates(model, GateConfig(), {dense_arch: case.dense} if case.dense_gates else None)
    return model


def shard(case: Case, model: nn.Module | None = None) -> DistributedModelParallel:
    """The model of the case, sharded with the plan of the case."""
    model = build(case) if model is None else model
    fused = {"optimizer": case.optimizer, "learning_rate": 0.1}
    all_sharders = sharders(None if case.in_backward else fused)
    plan = FixedPlanner(case.sharding, kernel=case.kernel).plan(model, all_sharders)
    return DistributedModelParallel(
        model, device=torch.device("cpu"), plan=plan, sharders=all_sharders
    )


def batch(step: int, dense: Sequence[str] = DENSE, rows: int = BATCH_SIZE) -> Batch:
    """This rank's batch of a step, with these dense columns."""
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    lengths = torch.randint(0, 4, (len(FEATURES), rows), generator=generator)
    values = []
    for row, feature in zip(lengths, FEATURES, strict=True):
        size = next(size for size, features in TABLES.values() if feature in features)
        values.append(torch.randint(0, size, (int(row.sum()),), generator=generator))
    columns = [DENSE.index(name) for name in dense]
    return Batch(
        dense_features=torch.randn(rows, len(DENSE), generator=generator)[:, columns],
        sparse_features=KeyedJaggedTensor(
            keys=list(FEATURES), values=torch.cat(values), lengths=lengths.flatten()
        ),
        labels=torch.randint(0, 2, (rows,), generator=generator),
    )


def select(gates: Mapping[str, float], case: Case | None = None) -> Selection:
    """A selection with these gates; every other gated feature of the case stays as it is."""
    case = case or Case()
    names = [*case.features, *(case.dense if case.dense_gates and case.gated else ())]
    return Selection(
        {
            name: FeatureDecision(0.0, gates.get(name, 1.0), gates.get(name, 1.0) > 0, "test")
            for name in names
        }
    )


def kept_dense(selection: Selection) -> tuple[str, ...]:
    return tuple(name for name in DENSE if name not in selection.dropped)


def dense_parameters(dmp: DistributedModelParallel) -> dict[str, nn.Parameter]:
    """Parameters that have no fused optimizer, gates included, by fqn."""
    return {
        name: parameter
        for name, parameter in dmp.named_parameters()
        if not hasattr(parameter, "_in_backward_optimizers")
    }


def forward(dmp: DistributedModelParallel, some: Batch) -> tuple[Tensor, Tensor]:
    """Loss and logits (B,)."""
    if not isinstance(get_unwrapped_module(dmp), DLRM):
        loss, (_, logits, _) = dmp(some)
        return loss, logits
    logits = dmp(some.dense_features, some.sparse_features).squeeze(-1)
    return nn.functional.binary_cross_entropy_with_logits(logits, some.labels.float()), logits


def train(
    dmp: DistributedModelParallel,
    optimizer: Optimizer,
    steps: Iterable[int],
    dense: Sequence[str] = DENSE,
) -> list[float]:
    """Losses of the steps."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss, _ = forward(dmp, batch(step, dense))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def adam(dmp: DistributedModelParallel) -> Optimizer:
    """Adam of the dense parameters and the gates."""
    return torch.optim.Adam(dense_parameters(dmp).values(), lr=0.02)


def trained(case: Case, steps: int = 3) -> tuple[DistributedModelParallel, Optimizer]:
    """The case's model and its Adam after some steps with sampled gates."""
    dmp = shard(case)
    optimizer = adam(dmp)
    train(dmp, optimizer, range(steps))
    return dmp, optimizer


def set_open(dmp: nn.Module) -> None:
    for _, gates in feature_gates(dmp):
        gates.set_open(True)


@torch.no_grad()
def logits(
    dmp: DistributedModelParallel, step: int, selection: Selection | None, dense: Sequence[str]
) -> Tensor:
    """Logits of the model in evaluation, with its gates at the selection's values."""
    was_training = dmp.training
    dmp.eval()
    for _, gates in feature_gates(dmp):
        gates.fix(selection.gates if selection else None)
    _, output = forward(dmp, batch(step, dense))
    for _, gates in feature_gates(dmp):
        gates.fix(None)
    dmp.train(was_training)
    return output.detach().clone()


def plain_name(fqn: str) -> str:
    """Fqn without the gates' wrappers."""
    return fqn.replace("._embedding_bag_collection", "").replace("._module", "")


def dense_state(dmp: DistributedModelParallel, optimizer: Optimizer) -> Tensors:
    """Dense parameters and their optimizer state by plain fqn, without the gates'."""
    tensors = {}
    for fqn, parameter in dense_parameters(dmp).items():
        if fqn.endswith("log_alpha"):
            continue
        tensors[plain_name(fqn)] = parameter.detach().clone()
        for name, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{plain_name(fqn)}/{name}"] = torch.as_tensor(value).clone()
    return tensors


Piece = tuple[tuple[int, int, int, int], str, Tensor]


def pieces(dmp: DistributedModelParallel) -> list[tuple[str, Piece]]:
    """(table, (box, tensor's name, values)) of every weight and state that this rank holds.

    A state with one value per row is repeated for the columns that it belongs to.
    """
    found: list[tuple[str, Piece]] = []
    for collection in sharded_collections(dmp).values():
        for shard in local_shards(collection):
            box = (shard.box.row, shard.box.column, shard.box.rows, shard.box.columns)
            for name, tensor in {"weight": shard.weight, **shard.states}.items():
                value = tensor.clone()
                if value.dim() == 1:
                    value = value.unsqueeze(1).repeat(1, shard.box.columns)
                found.append((shard.table, (box, name, value)))
    return found


def assemble(ranks: Iterable[list[tuple[str, Piece]]]) -> dict[str, Tensors]:
    """Table -> whole weight and states, each (rows, columns); every element must be there."""
    found: dict[str, dict[str, list[Piece]]] = {}
    for rank in ranks:
        for table, piece in rank:
            found.setdefault(table, {}).setdefault(piece[1], []).append(piece)
    return {
        table: {name: _assemble(some) for name, some in by_name.items()}
        for table, by_name in found.items()
    }


def _assemble(some: list[Piece]) -> Tensor:
    rows = max(row + height for (row, _, height, _), _, _ in some)
    columns = max(column + width for (_, column, _, width), _, _ in some)
    whole = torch.full((rows, columns), torch.nan)
    for (row, column, height, width), _, value in some:
        whole[row : row + height, column : column + width] = value
    assert not whole.isnan().any()
    return whole
