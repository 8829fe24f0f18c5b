"""Attaches gates to a model before sharding, and finds them afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from torchrec.distributed.model_parallel import get_unwrapped_module
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingBagCollectionInterface,
    EmbeddingCollection,
    EmbeddingCollectionInterface,
)
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.modules.itep_embedding_modules import (
    ITEPEmbeddingBagCollection,
    ITEPEmbeddingCollection,
)
from torchrec.modules.mc_embedding_modules import BaseManagedCollisionEmbeddingCollection

from torchrec_fmp.embeddings.collections import feature_names, table_configs
from torchrec_fmp.embeddings.compiled import module_compiled_by
from torchrec_fmp.gates.feature_gates import FeatureGates, GateConfig
from torchrec_fmp.gates.gated import (
    GatedCollection,
    GatedDense,
    GatedEmbeddingBagCollection,
    GatedEmbeddingCollection,
)
from torchrec_fmp.gates.sharded import ShardedGatedCollection

_GATED: dict[type[nn.Module], type[GatedCollection]] = {
    EmbeddingBagCollection: GatedEmbeddingBagCollection,
    EmbeddingCollection: GatedEmbeddingCollection,
}
_OTHER_COLLECTIONS = (
    EmbeddingBagCollectionInterface,
    EmbeddingCollectionInterface,
    FeatureProcessedEmbeddingBagCollection,
    ITEPEmbeddingBagCollection,
    ITEPEmbeddingCollection,
    BaseManagedCollisionEmbeddingCollection,
)


def attach_gates(
    model: nn.Module,
    config: GateConfig | None = None,
    dense: Mapping[str, Sequence[str]] | None = None,
) -> nn.Module:
    """Attaches a gate to every feature of the model, in place.

    A feature that several collections read has one gate for all of them.

    Args:
        model: model before sharding; every `EmbeddingBagCollection` and `EmbeddingCollection` in it
            is wrapped, wherever it is used.
        config: configuration of the gates; the default is `GateConfig()`.
        dense: fqn of a module whose only argument is a dense input (B, F) -> the F column names.

    Returns:
        `model`, for chaining.

    Raises:
        ValueError: if there is nothing to gate, a feature would get two gates, or the model
            already has gates.
        TypeError: if the model has a collection that cannot be pruned, or one that `torch.compile`
            wraps.
        AttributeError: if `dense` names a module that the model does not have.
    """
    config = config or GateConfig()
    if any(True for _ in feature_gates(model)):
        raise ValueError("the model already has gates: call attach_gates only once")
    collections = _collections(model)
    features = {
        fqn: feature_names(table_configs(collection)) for fqn, collection in collections.items()
    }
    dense_modules = {
        fqn: (model.get_submodule(fqn), tuple(names)) for fqn, names in (dense or {}).items()
    }
    _check_names(features, {fqn: names for fqn, (_, names) in dense_modules.items()})
    gated: dict[int, nn.Module] = {}
    for group in _groups(features):
        union = dict.fromkeys(name for fqn in group for name in features[fqn])
        gates = FeatureGates(tuple(union), config, name=group[0])
        for fqn in group:
            collection = collections[fqn]
            gated[id(collection)] = _GATED[type(collection)](collection, gates)
    # With duplicates: a module that is used in several places is replaced in each.
    for fqn, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in gated:
            _replace(model, fqn, gated[id(module)])
    for fqn, (module, names) in dense_modules.items():
        _replace(model, fqn, GatedDense(module, FeatureGates(names, config, name=fqn)))
    return model


def feature_gates(model: nn.Module) -> Iterator[tuple[str, FeatureGates]]:
    """Yields (fqn, gates) of every gated module, sharded or not, in the model's order.

    Gates that several collections share are yielded once, under the first collection's fqn.
    """
    for fqn, module in get_unwrapped_module(model).named_modules():
        if isinstance(module, FeatureGates):
            yield fqn, module


def embedding_features(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Fqn of every gated embedding collection, sharded or not -> its features."""
    return {
        fqn: module.features
        for fqn, module in get_unwrapped_module(model).named_modules()
        if isinstance(module, (GatedCollection, ShardedGatedCollection))
    }


def gate_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.Adam:
    """Adam for all gates of the model; clamps `log_alpha` to its bounds after each step.

    Raises:
        ValueError: if the model has no gates.
    """
    gates = [module for _, module in feature_gates(model)]
    if not gates:
        raise ValueError("the model has no gates: call attach_gates before it is sharded")
    log_alphas = [module.log_alpha for module in gates]
    optimizer = torch.optim.Adam(log_alphas, lr=learning_rate, fused=True)

    def clamp(*_: object) -> None:
        for module in gates:
            module.clamp_()

    optimizer.register_step_post_hook(clamp)
    return optimizer


def _collections(model: nn.Module) -> dict[str, nn.Module]:
    """Fqn -> collection to gate; each collection appears once."""
    for fqn, module in model.named_modules():
        if isinstance(module, _OTHER_COLLECTIONS) and type(module) not in _GATED:
            raise TypeError(
                f"{fqn or 'the model'} is a {type(module).__name__}; only EmbeddingBagCollection "
                "and EmbeddingCollection can be gated and pruned"
            )
        # Its forward stays bound to the collection, whatever replaces the collection.
        if type(module) not in _GATED and type(module_compiled_by(module)) in _GATED:
            raise TypeError(
                f"{fqn or 'the model'} is a collection that torch.compile wraps. Neither gates nor "
                "TorchRec's sharding can replace it: compile the layers that read it instead"
            )
    return {fqn: module for fqn, module in model.named_modules() if type(module) in _GATED}


def _groups(features: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Groups the fqns of collections that share a feature, directly or through others."""
    groups: list[list[str]] = []
    for fqn, names in features.items():
        joined = [g for g in groups if any(set(names) & set(features[other]) for other in g)]
        groups = [group for group in groups if group not in joined]
        groups.append([other for group in joined for other in group] + [fqn])
    return groups


def _check_names(
    features: Mapping[str, Sequence[str]], columns: Mapping[str, Sequence[str]]
) -> None:
    if not features and not columns:
        raise ValueError(
            "the model has no EmbeddingBagCollection or EmbeddingCollection and no dense module "
            "was named: there is nothing to gate. Attach gates before the model is sharded"
        )
    if "" in features or "" in columns:
        raise ValueError("the model itself is the module to gate; wrap it in a module first")
    count = Counter(name for names in columns.values() for name in names)
    count.update({name for names in features.values() for name in names})
    repeated = sorted(name for name, times in count.items() if times > 1)
    if repeated:
        readers = {**features, **columns}
        places = {name: [f for f, names in readers.items() if name in names] for name in repeated}
        raise ValueError(
            f"these features would get more than one gate: {places}. Give each its own name"
        )


def _replace(model: nn.Module, fqn: str, module: nn.Module) -> None:
    parent, _, name = fqn.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
