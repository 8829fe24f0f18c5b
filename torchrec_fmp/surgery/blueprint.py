"""`blueprint`: the unsharded, ungated model on the meta device, rebuilt from the sharded one.

It is computed when needed, so it includes the user's changes since sharding, and works for a model
that never had gates.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embedding_types import ShardedEmbeddingModule
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import get_unwrapped_module
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.types import CacheMixin

from torchrec_fmp.embeddings.collections import table_weight
from torchrec_fmp.embeddings.compiled import (
    Compilers,
    compilers,
    uncompiled,
    warn_of_compilation_in_place,
)
from torchrec_fmp.embeddings.fqns import own_fqn
from torchrec_fmp.embeddings.meta import meta_parameter
from torchrec_fmp.embeddings.seams import (
    copy_fused_optimizer,
    is_weighted,
    sequence_options,
    sharded_table_configs,
)
from torchrec_fmp.embeddings.wrappers import CollectionWrapper
from torchrec_fmp.gates.gated import GatedDense


@dataclass(frozen=True)
class Blueprint:
    """The model as its author wrote it, without weights.

    Args:
        model: unsharded model with parameters on the meta device and copies of buffers. Nothing
            wraps its modules, so its fqns are own fqns.
        dense_features: own fqn of a module that reads gated dense columns -> the columns' names.
        compilers: compilers of the model's modules, by own fqn.
    """

    model: nn.Module
    dense_features: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    compilers: Compilers = field(default_factory=dict)


def blueprint(model: nn.Module) -> Blueprint:
    """Takes the blueprint of a model, sharded or not.

    Modules that were compiled in place, by `module.compile()`, are not compiled in the pruned
    model, because torch does not record the options. Caches from earlier batches are left out:
    TorchRec's `KTRegroupAsDict` caches the order of the keys, which another plan changes.

    Raises:
        TypeError: for a sharded module other than an `EmbeddingBagCollection` or
            `EmbeddingCollection`, gated or plain.
    """
    module = get_unwrapped_module(model)
    memo: dict[int, Any] = {
        id(parameter): meta_parameter(parameter) for parameter in module.parameters()
    }
    memo |= {id(compiler): compiler for compiler in compilers(module)}
    dense_features = {}
    for fqn, child in module.named_modules(remove_duplicate=False):
        if isinstance(child, CollectionWrapper):
            memo[id(child)] = _unsharded(child.collection, fqn, memo)
        elif isinstance(child, GatedDense):
            dense_features[own_fqn(module, fqn)] = child.gates.features
            memo[id(child)] = copy.deepcopy(child.wrapped, memo)
        elif isinstance(child, ShardedEmbeddingModule):
            _unsharded(child, fqn, memo)
        warn_of_compilation_in_place(child, fqn)
    own, found = uncompiled(copy.deepcopy(module, memo))
    for child in own.modules():
        if isinstance(child, CacheMixin):
            child.clear_cache()
    return Blueprint(own, dense_features, found)


def _unsharded(collection: nn.Module, fqn: str, memo: dict[int, Any]) -> nn.Module:
    """The collection on the meta device, with the fused optimizers that were set on its parameters.

    The memo gets the result, so that a collection that is read in several places stays one object.
    """
    if id(collection) not in memo:
        if isinstance(collection, ShardedEmbeddingBagCollection):
            memo[id(collection)] = _unsharded_bags(collection)
        elif isinstance(collection, ShardedEmbeddingCollection):
            memo[id(collection)] = _unsharded_sequences(collection, fqn)
        elif isinstance(collection, ShardedEmbeddingModule):
            raise TypeError(
                f"{fqn} is a {type(collection).__name__}; only EmbeddingBagCollection and "
                "EmbeddingCollection can be pruned"
            )
        else:
            copy.deepcopy(collection, memo)
    unsharded: nn.Module = memo[id(collection)]
    return unsharded


def _unsharded_bags(sharded: ShardedEmbeddingBagCollection) -> EmbeddingBagCollection:
    collection = EmbeddingBagCollection(
        tables=copy.deepcopy(sharded_table_configs(sharded)),
        is_weighted=is_weighted(sharded),
        device=torch.device("meta"),
    )
    for infos in sharded.sharding_type_to_sharding_infos.values():
        for info in infos:
            copy_fused_optimizer(info.param, table_weight(collection, info.embedding_config.name))
    return collection


def _unsharded_sequences(sharded: ShardedEmbeddingCollection, fqn: str) -> EmbeddingCollection:
    collection = EmbeddingCollection(
        tables=copy.deepcopy(sharded_table_configs(sharded)),
        device=torch.device("meta"),
        **sequence_options(sharded),
    )
    if not hasattr(sharded, "tables_before_sharding"):
        raise TypeError(
            f"{fqn} was sharded by TorchRec's EmbeddingCollectionSharder, which forgets the "
            "optimizers that were set on its tables: shard with torchrec_fmp.sharders()"
        )
    for table, weight in sharded.tables_before_sharding.items():
        copy_fused_optimizer(weight, table_weight(collection, table))
    return collection
