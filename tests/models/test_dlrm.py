"""The DLRM backbone takes its sizes from the schema."""

from __future__ import annotations

import pytest
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from tests.support.small_batch import (
    CPU,
    SPARSE,
    batch,
    check_any_number_of_dense_columns,
    check_only_tables_on_meta,
    check_same_seed_same_weights,
    on_cpu,
)
from torchrec_fmp.data.schema import Schema
from torchrec_fmp.models.dlrm import DlrmBackbone

EBC = "model.sparse_arch.embedding_bag_collection"


def test_each_sparse_column_gets_a_table_of_its_cardinality() -> None:
    model = DlrmBackbone(8).build(Schema("y", ("x",), SPARSE), CPU)
    collection = model.get_submodule(EBC)
    assert isinstance(collection, EmbeddingBagCollection)
    configs = collection.embedding_bag_configs()
    tables = [(c.name, c.feature_names, c.num_embeddings, c.embedding_dim) for c in configs]
    assert tables == [("t_a", ["a"], 5, 8), ("t_b", ["b"], 70, 8)]


def test_only_the_tables_are_on_meta() -> None:
    check_only_tables_on_meta(DlrmBackbone(8))


@pytest.mark.parametrize("dense", [(), ("x",), ("x", "z")])
def test_the_model_trains_with_any_number_of_dense_columns(dense: tuple[str, ...]) -> None:
    check_any_number_of_dense_columns(DlrmBackbone(4, [6], [6]), dense)


def test_the_same_global_seed_gives_the_same_dense_weights() -> None:
    check_same_seed_same_weights(DlrmBackbone(4))


@pytest.mark.parametrize("size", [0, 2, 6, -4])
def test_an_embedding_dim_that_fbgemm_cannot_use_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"embedding_dim is {size}; .*multiple of 4"):
        DlrmBackbone(embedding_dim=size)


@pytest.mark.parametrize(
    ("dense_arch", "over_arch"), [([0], [4]), ([4], [-1]), ([4], []), ([4, 0], [4])]
)
def test_invalid_layer_sizes_are_refused(dense_arch: list[int], over_arch: list[int]) -> None:
    with pytest.raises(ValueError, match="all sizes must be positive, and over_arch needs"):
        DlrmBackbone(4, dense_arch, over_arch)


def test_the_dense_arch_may_have_only_its_last_layer() -> None:
    model = on_cpu(DlrmBackbone(4, [], [4]).build(Schema("y", ("x",), SPARSE), CPU))
    assert bool(model(batch(1))[0].isfinite())
