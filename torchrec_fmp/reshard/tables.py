"""All tables of a sharded model: facts that every rank knows, and this rank's shards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    ShardingPlan,
)
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from torchrec_fmp.distributed.agreement import all_or_none
from torchrec_fmp.embeddings.boxes import is_dense, shards_of
from torchrec_fmp.embeddings.collections import table_configs, weight_name
from torchrec_fmp.embeddings.fqns import join_fqn
from torchrec_fmp.embeddings.local_shards import (
    LocalShard,
    local_shards,
    sharded_collections,
    table_fqn,
)
from torchrec_fmp.embeddings.seams import sharded_table_configs
from torchrec_fmp.reshard.dense_state import DenseState
from torchrec_fmp.reshard.transfer_plan import TableMove
from torchrec_fmp.surgery.cut_map import CutMap

_T = TypeVar("_T")


@dataclass(frozen=True)
class Layout:
    """The form of a table and its optimizer state, the same on all its ranks.

    Args:
        dtype: dtype of the weight.
        states: optimizer states by name: dtype, and whether there is one value per row (True) or
            one per element. Empty for a table of the dense optimizer, until `with_dense_states` has
            read the states there.
        step: step of the optimizer.
        learning_rate: learning rate that the kernel used last. The parameter group's may be ahead
            of it, because a scheduler steps last.
        hyperparameters: hyperparameters of the fused optimizer's parameter group.
        form: form of the dense optimizer's state, once it has been read there.
    """

    dtype: torch.dtype
    states: Mapping[str, tuple[torch.dtype, bool]] = field(default_factory=dict)
    step: int = 0
    learning_rate: float = 0.0
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    form: DenseState | None = None

    @property
    def bytes_per_element(self) -> int:
        """Bytes per element of the weight and the states of its shape."""
        states = [dtype.itemsize for dtype, by_row in self.states.values() if not by_row]
        return self.dtype.itemsize + sum(states)

    @property
    def bytes_per_row(self) -> int:
        """Bytes per row of the states with one value per row."""
        return sum(dtype.itemsize for dtype, by_row in self.states.values() if by_row)


@dataclass(frozen=True)
class Tables:
    """The tables of a model, by the own fqn of their weight.

    Args:
        shards: all ranks' shards, (S,) of dtype `SHARD`.
        dense: tables whose shards are parameters of the dense optimizer: data-parallel ones, and
            sharded ones on the dense kernel.
        layouts: layout of each table.
        local: this rank's shards.
    """

    shards: Mapping[str, NDArray[np.void]]
    dense: frozenset[str]
    layouts: Mapping[str, Layout]
    local: Mapping[str, list[LocalShard]]

    def __iter__(self) -> Iterator[LocalShard]:
        return (shard for shards in self.local.values() for shard in shards)

    def local_bytes(self) -> int:
        """Bytes of this rank's weights and states."""
        return sum(tensor.nbytes for shard in self for tensor in shard.tensors.values())

    def change(self, function: Callable[[str, LocalShard], LocalShard]) -> Tables:
        """A copy with every local shard replaced by `function(fqn, shard)`."""
        local = {
            fqn: [function(fqn, shard) for shard in shards] for fqn, shards in self.local.items()
        }
        return replace(self, local=local)


def tables(model: nn.Module, group: dist.ProcessGroup, timeout: timedelta) -> Tables:
    """The tables of a sharded model.

    Collective: a rank may hold no part of a table, so the layouts, a few numbers, are gathered.

    Raises:
        TypeError: for a compute kernel whose tables cannot be moved.
        RuntimeError: if another rank fails.
    """
    with all_or_none("taking stock of the tables", group, timeout):
        shards, dense, local = _stock(model, group.size())
    layouts = from_one_rank_each(shards, lambda name: _layout(local[name][0]), group, timeout)
    return Tables(shards, dense, layouts, local)


def _stock(
    model: nn.Module, world_size: int
) -> tuple[dict[str, NDArray[np.void]], frozenset[str], dict[str, list[LocalShard]]]:
    shards: dict[str, NDArray[np.void]] = {}
    local: dict[str, list[LocalShard]] = defaultdict(list)
    dense = set()
    for fqn, collection in sharded_collections(model).items():
        for config in sharded_table_configs(collection):
            name = table_fqn(fqn, collection, config.name)
            sharding = collection.module_sharding_plan[config.name]
            if is_dense(sharding):
                dense.add(name)
            shape = (config.num_embeddings, config.embedding_dim)
            shards[name] = shards_of(sharding, *shape, world_size)
            local[name] = []
        for shard in local_shards(collection):
            local[table_fqn(fqn, collection, shard.table)].append(shard)
    return shards, frozenset(dense), dict(local)


def from_one_rank_each(
    shards: Mapping[str, NDArray[np.void]],
    say: Callable[[str], _T],
    group: dist.ProcessGroup,
    timeout: timedelta,
) -> dict[str, _T]:
    """For each table, the answer of one rank that holds it, on every rank.

    Collective. If every holder answered, a thousand ranks would send a million answers. If the
    first holder always answered, rank 0 would send nearly all answers, and a gather makes room for
    the longest from each rank. So the tables' holders take turns.

    Args:
        shards: fqn -> all ranks' shards.
        say: function of the fqn, called where this rank answers.
        group: process group of all ranks.
        timeout: time to wait for the slowest rank.
    """
    rank = dist.get_rank(group)
    with all_or_none("asking one rank of each table", group, timeout):
        # Sorted, because ranks need not have the tables in the same order.
        mine = {
            name: say(name)
            for index, name in enumerate(sorted(shards))
            if len(held := shards[name]) and held["rank"][index % len(held)] == rank
        }
    gathered: list[dict[str, _T]] = [{}] * group.size()
    dist.all_gather_object(gathered, mine, group=group)
    return {name: said for part in gathered for name, said in part.items()}


class TableShape(NamedTuple):
    """A table of an unsharded model.

    Args:
        fqn: fqn of the weight.
        collection: fqn of the collection.
        table: name of the table.
        rows: number of embeddings.
        columns: embedding dimension.
    """

    fqn: str
    collection: str
    table: str
    rows: int
    columns: int


def table_shapes(model: nn.Module) -> list[TableShape]:
    """The tables of an unsharded model without gates."""
    shapes = []
    for fqn, module in model.named_modules():
        if isinstance(module, (EmbeddingBagCollection, EmbeddingCollection)):
            for config in table_configs(module):
                name = join_fqn(fqn, weight_name(module, config.name))
                size = (config.num_embeddings, config.embedding_dim)
                shapes.append(TableShape(name, fqn, config.name, *size))
    return shapes


def planned_moves(
    old: Tables, plan: ShardingPlan, smaller: nn.Module, cut_map: CutMap, world_size: int
) -> list[TableMove]:
    """The move of every surviving table from its current place to its place in the plan.

    Args:
        old: tables before.
        plan: plan for the smaller model.
        smaller: smaller model, not sharded.
        cut_map: map that gives each new table's source.
        world_size: number of ranks.
    """
    moves = []
    for fqn, collection, table, rows, columns in table_shapes(smaller):
        source = cut_map.tensors[fqn].source
        sharding = cast(EmbeddingModuleShardingPlan, plan.plan[collection])[table]
        targets = shards_of(sharding, rows, columns, world_size)
        layout = old.layouts[source]
        sizes = (layout.bytes_per_element, layout.bytes_per_row)
        moves.append(TableMove(fqn, old.shards[source], targets, *sizes))
    return moves


def _layout(shard: LocalShard) -> Layout:
    if not shard.is_fused:
        return Layout(shard.weight.dtype)
    (param_group,) = shard.kernel.fused_optimizer.param_groups
    return Layout(
        dtype=shard.weight.dtype,
        states={name: (t.dtype, t.dim() == 1) for name, t in sorted(shard.states.items())},
        step=int(shard.kernel.emb_module.iter.item()),
        learning_rate=shard.kernel.emb_module.get_learning_rate(),
        hyperparameters={name: v for name, v in param_group.items() if name != "params"},
    )


def storages(shards: Iterable[LocalShard]) -> list[Tensor]:
    """One tensor per storage of the shards' weights and states."""
    distinct = {
        tensor.untyped_storage().data_ptr(): tensor
        for shard in shards
        for tensor in shard.tensors.values()
        if tensor.numel() > 0
    }
    return list(distinct.values())
