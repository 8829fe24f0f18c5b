"""Drops features and tables of an embedding collection, and folds gates into the rows."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch

from torchrec_fmp.embeddings.collections import (
    C,
    table_configs,
    table_weight,
    weight_name,
    with_tables,
)
from torchrec_fmp.embeddings.fqns import join_fqn
from torchrec_fmp.embeddings.seams import copy_fused_optimizer
from torchrec_fmp.surgery.rules import Cutter


def cut_tables(collection: C, fqn: str, cutter: Cutter) -> tuple[C | None, dict[str, float]]:
    """Reduces a collection to the kept features.

    A table is dropped when all its features are; otherwise the table and its other features are
    untouched. If the kept features of a table agree on their gate, the gate is folded into the
    table's rows. A feature that several tables serve is folded in all of them or in none.

    Args:
        collection: `EmbeddingBagCollection` or `EmbeddingCollection` with parameters on the meta
            device.
        fqn: own fqn of the collection.
        cutter: cutter that records the cuts.

    Returns:
        The new collection on the meta device, or None if no feature is left; and, for each kept
        feature, the gate that is left for the layers that read it: 1 if the gate was folded.
    """
    configs = table_configs(collection)
    kept_by_table = {
        config.name: [feature for feature in config.feature_names if cutter.keeps(feature)]
        for config in configs
    }
    folded = _folded_tables(kept_by_table, cutter)
    configs_left, gates_left = [], {}
    for config in configs:
        kept = kept_by_table[config.name]
        if not kept:
            continue
        fold = cutter.gate(kept[0]) if config.name in folded else 1.0
        gates_left.update({feature: cutter.gate(feature) / fold for feature in kept})
        name = join_fqn(fqn, weight_name(collection, config.name))
        cutter.record(name, table_weight(collection, config.name), scale=torch.tensor([fold]))
        config = copy.deepcopy(config)
        config.feature_names = kept
        configs_left.append(config)
    if not configs_left:
        return None, {}
    smaller = with_tables(collection, configs_left)
    for config in configs_left:
        copy_fused_optimizer(
            table_weight(collection, config.name), table_weight(smaller, config.name)
        )
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
