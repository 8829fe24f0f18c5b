"""A model's tables, and the planned moves of the surviving ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from tests.support.placements import CUT_KINDS, array, placements, sharding_of
from torchrec_fmp.reshard.reshard import check_layouts
from torchrec_fmp.reshard.tables import Layout, Tables, planned_moves, table_shapes
from torchrec_fmp.surgery.cut_map import CutMap, TensorCut

BAGS, SEQUENCES = "sparse.bags", "sequences"
# Table -> its collection, rows and columns; every table serves one feature of its name.
CATALOGUE = {
    "t_clicks": (BAGS, 7, 8),
    "t_users": (BAGS, 1, 8),
    "t_items": (BAGS, 30, 16),
    "t_words": (SEQUENCES, 12, 4),
    "t_tags": (SEQUENCES, 5, 4),
}


def collections(kept: set[str]) -> nn.Module:
    """A model of a bag and a sequence collection with these tables, each left out if empty."""
    model = nn.Module()
    bags = [
        EmbeddingBagConfig(
            name=name, num_embeddings=rows, embedding_dim=columns, feature_names=[name]
        )
        for name, (kind, rows, columns) in CATALOGUE.items()
        if kind == BAGS and name in kept
    ]
    sequences = [
        EmbeddingConfig(name=name, num_embeddings=rows, embedding_dim=columns, feature_names=[name])
        for name, (kind, rows, columns) in CATALOGUE.items()
        if kind == SEQUENCES and name in kept
    ]
    model.sparse = nn.Module()
    if bags:
        model.sparse.bags = EmbeddingBagCollection(bags, device=torch.device("meta"))
    if sequences:
        model.sequences = EmbeddingCollection(sequences, device=torch.device("meta"))
    return model


def fqn(table: str) -> str:
    collection = CATALOGUE[table][0]
    kind = "embedding_bags" if collection == BAGS else "embeddings"
    return f"{collection}.{kind}.{table}.weight"


def test_tables_of_bag_and_sequence_collections_are_found_by_their_weights_fqn() -> None:
    shapes = table_shapes(collections(set(CATALOGUE)))
    assert [tuple(shape) for shape in shapes] == [
        (fqn(name), collection, name, rows, columns)
        for name, (collection, rows, columns) in CATALOGUE.items()
    ]
    assert table_shapes(nn.Sequential(nn.Linear(2, 2))) == []


@settings(deadline=None, max_examples=30)
@given(st.sets(st.sampled_from(list(CATALOGUE))), st.integers(1, 64), st.data())
def test_every_surviving_table_moves_from_its_old_shards_to_the_planned_ones(
    kept: set[str], ranks: int, data: st.DataObject
) -> None:
    def place(table: str) -> np.ndarray:
        _, rows, columns = CATALOGUE[table]
        return data.draw(placements(rows, columns, ranks, CUT_KINDS))

    sources = {name: place(name) for name in CATALOGUE}
    targets = {name: place(name) for name in kept}
    states = {"sum": (torch.float32, True), "momentum": (torch.float16, False)}
    old = Tables(
        {f"gated.{fqn(name)}": shards for name, shards in sources.items()},
        frozenset(),
        {f"gated.{fqn(name)}": Layout(torch.float32, states) for name in CATALOGUE},
        {},
    )
    modules: dict[str, EmbeddingModuleShardingPlan] = {}
    for name in kept:
        plan = modules.setdefault(CATALOGUE[name][0], EmbeddingModuleShardingPlan())
        plan[name] = sharding_of(targets[name])
    cuts = {
        fqn(name): TensorCut(f"gated.{fqn(name)}", torch.Size(CATALOGUE[name][1:])) for name in kept
    }
    moves = planned_moves(old, ShardingPlan(dict(modules)), collections(kept), CutMap(cuts), ranks)
    assert [move.table for move in moves] == [fqn(name) for name in CATALOGUE if name in kept]
    by_fqn = {fqn(name): name for name in CATALOGUE}
    for move in moves:
        assert np.array_equal(move.sources, sources[by_fqn[move.table]])
        assert np.array_equal(move.targets, targets[by_fqn[move.table]])
        assert (move.bytes_per_element, move.bytes_per_row) == (4 + 2, 4)


def of_layout(layout: Layout) -> Tables:
    return Tables({"t": array((0, 0, 0, 2, 2))}, frozenset(), {"t": layout}, {"t": []})


@pytest.mark.parametrize(
    "other",
    [
        Layout(torch.float16, {"sum": (torch.float32, True)}),
        Layout(torch.float32, {"momentum1": (torch.float32, True)}),
        Layout(torch.float32, {"sum": (torch.float32, False)}),
        Layout(torch.float32, {"sum": (torch.float16, True)}),
        Layout(torch.float32, {}),
    ],
    ids=["dtype of the weight", "name", "row-wise", "dtype of a state", "no state"],
)
def test_a_table_whose_dtype_or_states_would_change_is_refused(other: Layout) -> None:
    layout = Layout(torch.float32, {"sum": (torch.float32, True)}, step=3)
    cut_map = CutMap({"t": TensorCut("t", torch.Size([2, 2]))})
    with pytest.raises(ValueError, match=r"t has a weight of .* must not change"):
        check_layouts(of_layout(layout), of_layout(other), cut_map)
    advanced = Layout(torch.float32, {"sum": (torch.float32, True)}, step=9, learning_rate=0.5)
    check_layouts(of_layout(layout), of_layout(advanced), cut_map)
