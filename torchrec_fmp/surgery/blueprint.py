"""`blueprint`: the unsharded, ungated model on the meta device, rebuilt from the sharded one.

It is taken when it is needed, so what the user changed since sharding is in it, and a model that
never had gates has one too.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchrec.distributed.embedding_types import ShardedEmbeddingModule
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import get_unwrapped_module
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_fmp.gates.gated import GatedDense, GatedEmbeddingBagCollection
from torchrec_fmp.gates.sharded import ShardedGatedEmbeddingBagCollection
from torchrec_fmp.surgery.meta import copy_fused_optimizer, meta_parameter


@dataclass(frozen=True)
class Blueprint:
    """The model as its author wrote it, without weights.

    Args:
        model: parameters on the meta device; buffers are copies.
        dense_features: fqn of a module that reads gated dense columns -> the columns' names.
        sources: fqn in `model` -> fqn in the sharded model, for every parameter and buffer.
    """

    model: nn.Module
    dense_features: Mapping[str, tuple[str, ...]]
    sources: Mapping[str, str]


def blueprint(model: nn.Module) -> Blueprint:
    """Takes the blueprint of a model, sharded or not.

    Raises:
        TypeError: for a sharded module other than an `EmbeddingBagCollection`, gated or plain.
    """
    module = get_unwrapped_module(model)
    memo: dict[int, Any] = {
        id(parameter): meta_parameter(parameter) for parameter in module.parameters()
    }
    dense_features = {}
    inner: dict[str, str] = {}
    for fqn, child in module.named_modules():
        if isinstance(child, ShardedGatedEmbeddingBagCollection):
            memo[id(child)] = _unsharded(child._embedding_bag_collection)
            inner[fqn] = "_embedding_bag_collection"
        elif isinstance(child, ShardedEmbeddingBagCollection):
            memo.setdefault(id(child), _unsharded(child))
        elif isinstance(child, ShardedEmbeddingModule):
            raise TypeError(
                f"{fqn} is a {type(child).__name__}; only EmbeddingBagCollection can be pruned"
            )
        elif isinstance(child, GatedEmbeddingBagCollection):
            memo[id(child)] = copy.deepcopy(child._embedding_bag_collection, memo)
            inner[fqn] = "_embedding_bag_collection"
        elif isinstance(child, GatedDense):
            memo[id(child)] = copy.deepcopy(child._module, memo)
            inner[fqn] = "_module"
            dense_features[fqn] = child.gates.features
    bare = copy.deepcopy(module, memo)
    return Blueprint(bare, dense_features, _sources(bare, inner))


def _unsharded(sharded: ShardedEmbeddingBagCollection) -> EmbeddingBagCollection:
    """The collection on meta, with the fused optimizers that were set on its parameters."""
    collection = EmbeddingBagCollection(
        tables=copy.deepcopy(sharded._embedding_bag_configs),
        is_weighted=sharded._is_weighted,
        device=torch.device("meta"),
    )
    for infos in sharded.sharding_type_to_sharding_infos.values():
        for info in infos:
            weight = collection.embedding_bags[info.embedding_config.name].weight
            copy_fused_optimizer(info.param, weight)
    return collection


def _sources(bare: nn.Module, inner: Mapping[str, str]) -> dict[str, str]:
    sources = {}
    names = [name for name, _ in bare.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in bare.named_buffers(remove_duplicate=False)]
    for name in names:
        source = name
        for fqn, attribute in inner.items():
            if name.startswith(f"{fqn}."):
                source = f"{fqn}.{attribute}{name[len(fqn) :]}"
        sources[name] = source
    return sources
