"""Two sparse columns, a batch of them, and a backbone's model on the CPU."""

from __future__ import annotations

import torch
from torch import nn
from torchrec.datasets.utils import Batch
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_fmp.data.schema import Schema, SparseColumn
from torchrec_fmp.models.backbone import Backbone

SPARSE = (SparseColumn("a", 5), SparseColumn("b", 70))
CPU = torch.device("cpu")


def collection_of(model: nn.Module) -> EmbeddingBagCollection:
    (collection,) = (m for m in model.modules() if isinstance(m, EmbeddingBagCollection))
    return collection


def on_cpu(model: nn.Module) -> nn.Module:
    """The model with its tables, as `DistributedModelParallel` would make them."""
    collection = collection_of(model).to_empty(device=CPU)
    for config in collection.embedding_bag_configs():
        assert config.init_fn is not None
        config.init_fn(collection.embedding_bags[config.name].weight.detach())
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


def check_any_number_of_dense_columns(backbone: Backbone, dense: tuple[str, ...]) -> None:
    """A step of training, and the modules that read the dense columns."""
    schema = Schema("y", dense, SPARSE)
    model = on_cpu(backbone.build(schema, CPU))
    loss, (_, logits, labels) = model(batch(len(dense)))
    loss.backward()
    assert logits.shape == labels.shape == (3,)
    assert bool(loss.isfinite())
    assert all(table.grad is not None for table in collection_of(model).parameters())
    assert list(backbone.dense_modules(schema).values()) == ([dense] if dense else [])
    for fqn in backbone.dense_modules(schema):
        model.get_submodule(fqn)


def check_only_tables_on_meta(backbone: Backbone) -> None:
    model = backbone.build(Schema("y", ("x",), SPARSE), CPU)
    tables = {id(parameter) for parameter in collection_of(model).parameters()}
    for parameter in model.parameters():
        assert parameter.device.type == ("meta" if id(parameter) in tables else "cpu")


def check_same_seed_same_weights(backbone: Backbone) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(7)
        models.append(backbone.build(Schema("y", ("x",), SPARSE), CPU))
    first, second = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(first[n], second[n]) for n in first if first[n].device == CPU)
