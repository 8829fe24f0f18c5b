"""Puts gates into a model before it is sharded, and finds them again afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from torchrec.distributed.model_parallel import get_unwrapped_module
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection

from torchrec_fmp.gates.feature_gates import FeatureGates, GateConfig
from torchrec_fmp.gates.gated import GatedDense, GatedEmbeddingBagCollection
from torchrec_fmp.gates.sharded import ShardedGatedEmbeddingBagCollection


def attach_gates(
    model: nn.Module,
    config: GateConfig,
    dense: Mapping[str, Sequence[str]] | None = None,
) -> nn.Module:
    """Gives every feature of the model a gate, in place.

    Args:
        model: not yet sharded; every `EmbeddingBagCollection` in it is wrapped.
        config: of the gates.
        dense: fqn of a module whose only argument is a dense input (B, F) -> the F column names.

    Returns:
        `model`, for chaining.

    Raises:
        ValueError: if there is nothing to gate, a feature would get two gates, or the model has
            gates already.
        TypeError: if the model has a collection that cannot be pruned.
        AttributeError: if there is no module of a name in `dense`.
    """
    if any(True for _ in feature_gates(model)):
        raise ValueError("the model has gates already")
    for fqn, module in model.named_modules():
        if isinstance(module, (EmbeddingCollection, FeatureProcessedEmbeddingBagCollection)):
            raise TypeError(
                f"{fqn} is a {type(module).__name__}; only EmbeddingBagCollection can be gated and "
                "pruned"
            )
    collections = [
        (fqn, module)
        for fqn, module in model.named_modules()
        if type(module) is EmbeddingBagCollection
    ]
    dense_modules = [
        (fqn, model.get_submodule(fqn), tuple(names)) for fqn, names in (dense or {}).items()
    ]
    _check_names(
        {fqn: _features(module.embedding_bag_configs()) for fqn, module in collections}
        | {fqn: names for fqn, _, names in dense_modules}
    )
    for fqn, collection in collections:
        features = _features(collection.embedding_bag_configs())
        gates = FeatureGates(features, config, name=fqn)
        _replace(model, fqn, GatedEmbeddingBagCollection(collection, gates))
    for fqn, module, names in dense_modules:
        _replace(model, fqn, GatedDense(module, FeatureGates(names, config, name=fqn)))
    return model


def feature_gates(model: nn.Module) -> Iterator[tuple[str, FeatureGates]]:
    """(fqn, gates) of every gated module, sharded or not, in the model's order."""
    for fqn, module in get_unwrapped_module(model).named_modules():
        if isinstance(module, FeatureGates):
            yield fqn, module


def embedding_features(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Fqn of every gated embedding collection, sharded or not -> its features."""
    return {
        fqn: module.gates.features
        for fqn, module in get_unwrapped_module(model).named_modules()
        if isinstance(module, (GatedEmbeddingBagCollection, ShardedGatedEmbeddingBagCollection))
    }


def gate_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.Adam:
    """Adam for every gate of the model, which keeps `log_alpha` in its bounds after each step.

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


def _features(configs: Sequence[EmbeddingBagConfig]) -> tuple[str, ...]:
    """Features of the tables in order, one that several tables serve once."""
    return tuple(dict.fromkeys(feature for config in configs for feature in config.feature_names))


def _check_names(features_by_fqn: Mapping[str, Sequence[str]]) -> None:
    if not features_by_fqn:
        raise ValueError(
            "the model has no EmbeddingBagCollection and no dense module was named: "
            "there is nothing to gate. Attach gates before the model is sharded"
        )
    count = Counter(name for names in features_by_fqn.values() for name in names)
    repeated = sorted(name for name, times in count.items() if times > 1)
    if repeated:
        places = {name: [f for f, ns in features_by_fqn.items() if name in ns] for name in repeated}
        raise ValueError(f"features with more than one gate: {places}; give each its own name")


def _replace(model: nn.Module, fqn: str, module: nn.Module) -> None:
    parent, _, name = fqn.rpartition(".")
    if not name:
        raise ValueError("the model is itself what would be gated; wrap it in a module first")
    setattr(model.get_submodule(parent), name, module)
