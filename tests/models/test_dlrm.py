"""The DLRM backbone takes its sizes from the schema."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchrec.datasets.utils import Batch
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_fmp.data.schema import Schema, SparseColumn
from torchrec_fmp.models.dlrm import DlrmBackbone

SPARSE = (SparseColumn("a", 5), SparseColumn("b", 70))
CPU = torch.device("cpu")
EBC = "model.sparse_arch.embedding_bag_collection"


def on_cpu(model: nn.Module) -> nn.Module:
    """With its tables, as `DistributedModelParallel` would make them."""
    model.get_submodule(EBC).to_empty(device=CPU)
    for table in model.get_submodule(EBC).parameters():
        nn.init.uniform_(table)
    return model


def batch(dense: int, rows: int = 3) -> Batch:
    return Batch(
        dense_features=torch.randn(rows, dense),
        sparse_features=KeyedJaggedTensor.from_lengths_sync(
            keys=["a", "b"],
            values=torch.zeros(2 * rows, dtype=torch.int64),
            lengths=torch.ones(2 * rows, dtype=torch.int32),
        ),
        labels=torch.ones(rows),
    )


def test_each_sparse_column_gets_a_table_of_its_cardinality() -> None:
    model = DlrmBackbone(8).build(Schema("y", ("x",), SPARSE), CPU)
    collection = model.get_submodule(EBC)
    assert isinstance(collection, EmbeddingBagCollection)
    configs = collection.embedding_bag_configs()
    tables = [(c.name, c.feature_names, c.num_embeddings, c.embedding_dim) for c in configs]
    assert tables == [("t_a", ["a"], 5, 8), ("t_b", ["b"], 70, 8)]


def test_only_the_tables_are_on_meta() -> None:
    model = DlrmBackbone(8).build(Schema("y", ("x",), SPARSE), CPU)
    devices = {name: tensor.device.type for name, tensor in model.named_parameters()}
    assert {device for name, device in devices.items() if name.startswith(EBC)} == {"meta"}
    assert {device for name, device in devices.items() if not name.startswith(EBC)} == {"cpu"}


@pytest.mark.parametrize("dense", [(), ("x",), ("x", "z")])
def test_the_model_trains_with_any_number_of_dense_columns(dense: tuple[str, ...]) -> None:
    backbone = DlrmBackbone(4, [6], [6])
    schema = Schema("y", dense, SPARSE)
    model = on_cpu(backbone.build(schema, CPU))
    loss, (_, logits, labels) = model(batch(len(dense)))
    loss.backward()
    assert logits.shape == labels.shape == (3,)
    assert bool(loss.isfinite())
    assert list(backbone.dense_modules(schema).values()) == ([dense] if dense else [])
    for fqn in backbone.dense_modules(schema):
        model.get_submodule(fqn)


def test_the_same_global_seed_gives_the_same_dense_weights() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(7)
        models.append(DlrmBackbone(4).build(Schema("y", ("x",), SPARSE), CPU))
    first, second = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(first[n], second[n]) for n in first if first[n].device == CPU)


@pytest.mark.parametrize("size", [0, 2, 6, -4])
def test_an_embedding_dim_that_fbgemm_cannot_use_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"embedding_dim is {size}, .*multiple of 4"):
        DlrmBackbone(embedding_dim=size)


@pytest.mark.parametrize(
    ("dense_arch", "over_arch"), [([0], [4]), ([4], [-1]), ([4], []), ([4, 0], [4])]
)
def test_layer_sizes_that_make_no_network_are_refused(
    dense_arch: list[int], over_arch: list[int]
) -> None:
    with pytest.raises(ValueError, match="must be positive sizes, and over_arch needs"):
        DlrmBackbone(4, dense_arch, over_arch)


def test_the_dense_arch_may_be_the_last_layer_alone() -> None:
    model = on_cpu(DlrmBackbone(4, [], [4]).build(Schema("y", ("x",), SPARSE), CPU))
    assert bool(model(batch(1))[0].isfinite())
