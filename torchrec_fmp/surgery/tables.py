"""Drops features and tables of an `EmbeddingBagCollection`, and folds gates into its rows."""

from __future__ import annotations

import copy

import torch
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_fmp.surgery.meta import copy_fused_optimizer
from torchrec_fmp.surgery.rules import Cutter


def cut_tables(
    collection: EmbeddingBagCollection, fqn: str, cutter: Cutter
) -> tuple[EmbeddingBagCollection, dict[str, float]]:
    """The collection with the kept features only.

    A table goes when all its features go; otherwise it and the other features are untouched. Where
    the kept features of a table agree on their gate, it is folded into the table's rows.

    Args:
        collection: parameters on meta.
        fqn: of the collection.
        cutter: gets the records.

    Returns:
        The new collection on meta, and for each kept feature the gate that is left for the layers
        that read it: 1 where it was folded.

    Raises:
        ValueError: if no feature is left.
    """
    configs, gates_left = [], {}
    for config in collection.embedding_bag_configs():
        kept = [feature for feature in config.feature_names if cutter.keeps(feature)]
        if not kept:
            continue
        gates = {feature: cutter.gate(feature) for feature in kept}
        fold = gates[kept[0]] if len(set(gates.values())) == 1 else 1.0
        gates_left.update({feature: gate / fold for feature, gate in gates.items()})
        weight = collection.embedding_bags[config.name].weight
        name = f"{fqn}.embedding_bags.{config.name}.weight"
        cutter.record(name, weight, scale=torch.tensor([fold]))
        config = copy.deepcopy(config)
        config.feature_names = kept
        configs.append(config)
    if not configs:
        raise ValueError(f"every feature of {fqn} is dropped, at least one must stay")
    smaller = EmbeddingBagCollection(
        tables=configs, is_weighted=collection.is_weighted(), device=torch.device("meta")
    )
    for config in configs:
        old, new = (bags.embedding_bags[config.name].weight for bags in (collection, smaller))
        copy_fused_optimizer(old, new)
    return smaller, gates_left
