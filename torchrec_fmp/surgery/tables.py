"""Drops features and tables of an `EmbeddingBagCollection`, and folds gates into its rows."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_fmp.surgery.meta import copy_fused_optimizer
from torchrec_fmp.surgery.rules import Cutter


def cut_tables(
    collection: EmbeddingBagCollection, fqn: str, cutter: Cutter
) -> tuple[EmbeddingBagCollection, dict[str, float]]:
    """The collection with the kept features only.

    A table goes when all its features go; otherwise it and the other features are untouched. Where
    the kept features of a table agree on their gate, it is folded into the table's rows; a feature
    that several tables serve is folded in all of them or in none.

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
    kept_by_table = {
        config.name: [feature for feature in config.feature_names if cutter.keeps(feature)]
        for config in collection.embedding_bag_configs()
    }
    folded = _folded_tables(kept_by_table, cutter)
    configs, gates_left = [], {}
    for config in collection.embedding_bag_configs():
        kept = kept_by_table[config.name]
        if not kept:
            continue
        fold = cutter.gate(kept[0]) if config.name in folded else 1.0
        gates_left.update({feature: cutter.gate(feature) / fold for feature in kept})
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


def _folded_tables(kept_by_table: Mapping[str, Sequence[str]], cutter: Cutter) -> set[str]:
    """Tables whose features agree on their gate, and share none with a table that does not fold."""
    folded = {
        table
        for table, features in kept_by_table.items()
        if len({cutter.gate(feature) for feature in features}) == 1
    }
    while True:
        unfolded = {f for t, features in kept_by_table.items() if t not in folded for f in features}
        blocked = {table for table in folded if unfolded & set(kept_by_table[table])}
        if not blocked:
            return folded
        folded -= blocked
