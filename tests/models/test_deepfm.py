"""The DeepFM backbone is TorchRec's model before its sigmoid."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchrec.models.deepfm import SimpleDeepFMNN

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
from torchrec_fmp.models.deepfm import DeepFmBackbone


def test_only_the_tables_are_on_meta() -> None:
    check_only_tables_on_meta(DeepFmBackbone(8))


@pytest.mark.parametrize("dense", [(), ("x",), ("x", "z")])
def test_the_model_trains_with_any_number_of_dense_columns(dense: tuple[str, ...]) -> None:
    check_any_number_of_dense_columns(DeepFmBackbone(4, 6, 6), dense)


def test_the_model_trains_with_a_single_feature() -> None:
    model = on_cpu(DeepFmBackbone(4, 6, 6).build(Schema("y", (), SPARSE[:1]), CPU))
    assert bool(model(batch(0))[0].isfinite())


def test_the_same_global_seed_gives_the_same_dense_weights() -> None:
    check_same_seed_same_weights(DeepFmBackbone(4))


def test_the_logits_are_torchrecs_output_before_its_sigmoid() -> None:
    model = on_cpu(DeepFmBackbone(4, 6, 6).build(Schema("y", ("x",), SPARSE), CPU))
    some = batch(1)
    _, (_, logits, _) = model(some)
    inner = model.get_submodule("model")
    assert type(inner) is SimpleDeepFMNN
    inner.over_arch.model[1] = nn.Sigmoid()
    probabilities = inner(some.dense_features, some.sparse_features).squeeze(1)
    torch.testing.assert_close(probabilities, logits.sigmoid())


def test_the_loss_of_a_confident_mistake_is_finite_and_has_a_gradient() -> None:
    model = on_cpu(DeepFmBackbone(4, 6, 6).build(Schema("y", ("x",), SPARSE), CPU))
    bias = model.get_parameter("model.over_arch.model.0.bias")
    nn.init.constant_(bias, -500.0)
    loss, _ = model(batch(1))
    loss.backward()
    assert loss.item() == pytest.approx(500, rel=0.01)
    assert bias.grad is not None and bias.grad.item() == pytest.approx(-1)


def test_the_initial_factorization_machine_is_small_next_to_the_labels_entropy() -> None:
    """Its output is the square of a sum over all embeddings of all features."""
    model = on_cpu(DeepFmBackbone(16).build(Schema("y", (), SPARSE), CPU))
    loss, _ = model(batch(0))
    assert loss.item() < 1.5


@pytest.mark.parametrize("size", [0, 6])
def test_an_embedding_dim_that_fbgemm_cannot_use_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"embedding_dim is {size}; .*multiple of 4"):
        DeepFmBackbone(embedding_dim=size)


@pytest.mark.parametrize("sizes", [(0, 4), (4, -1)])
def test_invalid_layer_sizes_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must be positive layer sizes"):
        DeepFmBackbone(4, *sizes)
