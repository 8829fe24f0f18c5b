"""ERASE's backbone, layer by layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.support.small_batch import (
    CPU,
    SPARSE,
    batch,
    check_any_number_of_dense_columns,
    check_only_tables_on_meta,
    check_same_seed_same_weights,
    collection_of,
    on_cpu,
)
from torchrec_fmp.data.schema import Schema, SparseColumn
from torchrec_fmp.models.mlp import MlpBackbone


def test_only_the_tables_are_on_meta() -> None:
    check_only_tables_on_meta(MlpBackbone())


@pytest.mark.parametrize("dense", [(), ("x",), ("x", "z")])
def test_the_model_trains_with_any_number_of_dense_columns(dense: tuple[str, ...]) -> None:
    check_any_number_of_dense_columns(MlpBackbone(), dense)


def test_the_same_global_seed_gives_the_same_dense_weights() -> None:
    check_same_seed_same_weights(MlpBackbone())


def test_the_defaults_are_erases_layers_in_their_order() -> None:
    """github.com/Applied-Machine-Learning-Lab/ERASE, models/rec/mlp.py and models/basemodel.py."""
    columns = tuple(SparseColumn(name, 1000) for name in "abcd")
    model = on_cpu(MlpBackbone().build(Schema("y", (), columns), CPU)).get_submodule("model")
    layers = [model.sparse_layer, *model.over]
    kinds = (nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout)
    found = [next(kind for kind in kinds if isinstance(m, kind)) for m in layers]
    assert found == [*kinds, *kinds, nn.Linear]
    sizes = [(m.in_features, m.out_features) for m in layers if isinstance(m, nn.Linear)]
    assert sizes == [(4 * 8, 16), (16, 16), (16, 1)]
    assert [m.p for m in layers if isinstance(m, nn.Dropout)] == [0.2, 0.2]
    for table in collection_of(model).parameters():
        assert table.std().item() == pytest.approx(0.01, rel=0.1)


def test_without_norm_and_dropout_training_and_evaluation_compute_the_same() -> None:
    backbone = MlpBackbone(layers=[5], dropout=0, batch_norm=False)
    model = on_cpu(backbone.build(Schema("y", ("x",), SPARSE), CPU))
    some = batch(1)
    assert torch.equal(model(some)[0], model.eval()(some)[0])


def test_the_first_layer_reads_embeddings_and_dense_columns_as_one_concatenation() -> None:
    backbone = MlpBackbone(layers=[5], dropout=0, batch_norm=False)
    model = on_cpu(backbone.build(Schema("y", ("x", "z"), SPARSE), CPU)).get_submodule("model")
    some = batch(2)
    pooled = model.embedding_bag_collection(some.sparse_features)
    both = torch.cat([pooled["a"], pooled["b"], some.dense_features], 1)
    weight = torch.cat([model.sparse_layer.weight, model.dense_layer.weight], 1)
    hidden = nn.functional.linear(both, weight, model.sparse_layer.bias)
    expected = model.over[-1](hidden.relu())
    torch.testing.assert_close(model(some.dense_features, some.sparse_features), expected)


@pytest.mark.parametrize("layers", [[], [0], [4, -1]])
def test_invalid_layer_sizes_are_refused(layers: list[int]) -> None:
    with pytest.raises(ValueError, match="layers is .* at least one size, all positive"):
        MlpBackbone(layers=layers)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_invalid_dropout_is_refused(dropout: float) -> None:
    with pytest.raises(ValueError, match="dropout is .* below 1"):
        MlpBackbone(dropout=dropout)


def test_an_embedding_dim_that_fbgemm_cannot_use_is_refused() -> None:
    with pytest.raises(ValueError, match="embedding_dim is 6; .*multiple of 4"):
        MlpBackbone(embedding_dim=6)
