"""Cutting an `EmbeddingBagCollection`."""

from __future__ import annotations

import copy
from inspect import signature
from typing import Any

import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from tests.support.selections import select
from torchrec_fmp.surgery.cut_tables import cut_tables
from torchrec_fmp.surgery.rules import Cutter

TABLES = {"t_ab": ("a", "b"), "t_c": ("c",), "t_d": ("d",)}


def collection() -> EmbeddingBagCollection:
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=name,
                embedding_dim=4,
                num_embeddings=5,
                feature_names=list(features),
                pooling=PoolingType.MEAN,
            )
            for name, features in TABLES.items()
        ],
        is_weighted=True,
        device=torch.device("meta"),
    )


def weight(table: str) -> str:
    return f"ebc.embedding_bags.{table}.weight"


def test_a_table_is_dropped_with_all_its_features() -> None:
    cutter = Cutter(select(a=0, b=0, c=1))
    smaller, gates = cut_tables(collection(), "ebc", cutter)
    assert [config.name for config in smaller.embedding_bag_configs()] == ["t_c", "t_d"]
    assert gates == {"c": 1, "d": 1}
    assert cutter.tensors.keys() == {weight("t_c"), weight("t_d")}


def test_a_shared_table_stays_whole_when_one_of_its_features_is_dropped() -> None:
    old = collection()
    before = copy.deepcopy(old.embedding_bag_configs())
    cutter = Cutter(select(a=0))
    smaller, _ = cut_tables(old, "ebc", cutter)
    configs = smaller.embedding_bag_configs()
    assert [config.feature_names for config in configs] == [["b"], ["c"], ["d"]]
    for config, old_config in zip(configs, before, strict=True):
        for name in ("name", "num_embeddings", "embedding_dim", "pooling", "data_type"):
            assert getattr(config, name) == getattr(old_config, name)
    assert smaller.is_weighted()
    assert all(parameter.is_meta for parameter in smaller.parameters())
    assert all(cut.columns is None and cut.scale is None for cut in cutter.tensors.values())
    names = [config.feature_names for config in old.embedding_bag_configs()]
    assert names == [config.feature_names for config in before], "the old collection was changed"


@pytest.mark.parametrize(
    ("gates", "scale", "left"),
    [
        ({"a": 0.5, "b": 0.5}, 0.5, {"a": 1, "b": 1}),
        ({"a": 0.0, "b": 0.5}, 0.5, {"b": 1}),
        ({"a": 0.25, "b": 0.5}, None, {"a": 0.25, "b": 0.5}),
        ({"a": 1.0, "b": 0.5}, None, {"a": 1, "b": 0.5}),
        ({"a": 1.0, "b": 1.0}, None, {"a": 1, "b": 1}),
    ],
)
def test_gates_fold_into_the_rows_where_the_kept_features_agree(
    gates: dict[str, float], scale: float | None, left: dict[str, float]
) -> None:
    cutter = Cutter(select(**gates))
    _, found = cut_tables(collection(), "ebc", cutter)
    assert found == {**left, "c": 1, "d": 1}
    folded = cutter.tensors[weight("t_ab")].scale
    assert (None if folded is None else folded.tolist()) == (None if scale is None else [scale])


def test_a_collection_without_a_kept_feature_is_dropped() -> None:
    cutter = Cutter(select(a=0, b=0, c=0, d=0))
    assert cut_tables(collection(), "ebc", cutter) == (None, {})
    assert cutter.tensors == {}


# An option that TorchRec 1.6 does not have.
BY_SHARDING: dict[str, Any] = (
    {"use_gather_select_per_sharding": {"row_wise": False}}
    if "use_gather_select_per_sharding" in signature(EmbeddingCollection).parameters
    else {}
)


def sequences() -> EmbeddingCollection:
    tables = [
        EmbeddingConfig(name=name, embedding_dim=4, num_embeddings=5, feature_names=list(features))
        for name, features in TABLES.items()
    ]
    return EmbeddingCollection(
        tables=tables,
        device=torch.device("meta"),
        need_indices=True,
        use_gather_select=True,
        **BY_SHARDING,
    )


def test_a_collection_of_sequences_shrinks_and_folds_like_one_of_bags() -> None:
    old = sequences()
    apply_optimizer_in_backward(RowWiseAdagrad, [old.embeddings["t_ab"].weight], {"lr": 0.3})
    cutter = Cutter(select(a=0, b=0.5, c=0))
    smaller, gates = cut_tables(old, "ec", cutter)
    assert type(smaller) is EmbeddingCollection
    assert [config.feature_names for config in smaller.embedding_configs()] == [["b"], ["d"]]
    assert gates == {"b": 1, "d": 1}
    assert {name: cut.scale for name, cut in cutter.tensors.items()} == {
        "ec.embeddings.t_ab.weight": torch.tensor([0.5]),
        "ec.embeddings.t_d.weight": None,
    }
    assert smaller.need_indices() and smaller.use_gather_select()
    if BY_SHARDING:
        assert smaller.use_gather_select_per_sharding() == {"row_wise": False}
    assert smaller.embeddings["t_ab"].weight._optimizer_classes == [RowWiseAdagrad]
    assert all(parameter.is_meta for parameter in smaller.parameters())


def test_the_fused_optimizer_of_a_parameter_survives() -> None:
    old = collection()
    weights = [old.embedding_bags[table].weight for table in ("t_ab", "t_c")]
    apply_optimizer_in_backward(RowWiseAdagrad, weights, {"lr": 0.3})
    smaller, _ = cut_tables(old, "ebc", Cutter(select(c=0)))
    assert smaller.embedding_bags["t_ab"].weight._optimizer_classes == [RowWiseAdagrad]
    assert smaller.embedding_bags["t_ab"].weight._optimizer_kwargs == [{"lr": 0.3}]
    assert not hasattr(smaller.embedding_bags["t_d"].weight, "_optimizer_classes")


def served_twice(*features_by_table: tuple[str, ...]) -> EmbeddingBagCollection:
    tables = [
        EmbeddingBagConfig(
            name=f"t{i}", embedding_dim=4, num_embeddings=5, feature_names=list(features)
        )
        for i, features in enumerate(features_by_table)
    ]
    return EmbeddingBagCollection(tables=tables, device=torch.device("meta"))


def test_a_feature_of_several_tables_folds_into_all_of_them_or_none() -> None:
    tables = (("f", "h"), ("f",), ("f", "g"), ("g",), ("i",))
    cutter = Cutter(select(f=0.8, h=1, g=0.8, i=0.5))
    _, gates = cut_tables(served_twice(*tables), "ebc", cutter)
    # t0 cannot fold, so f folds nowhere, so t2 does not, so g folds nowhere.
    assert gates == {"f": pytest.approx(0.8), "h": 1, "g": pytest.approx(0.8), "i": 1}
    scales = {name: cut.scale for name, cut in cutter.tensors.items()}
    assert [name for name, scale in scales.items() if scale is not None] == [weight("t4")]


def test_a_feature_of_several_tables_folds_where_all_of_them_can() -> None:
    cutter = Cutter(select(f=0.8, g=0.8))
    _, gates = cut_tables(served_twice(("f", "g"), ("f",)), "ebc", cutter)
    assert gates == {"f": 1, "g": 1}
    assert all(cut.scale == torch.tensor([0.8]) for cut in cutter.tensors.values())
