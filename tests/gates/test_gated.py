"""Gates after the lookup and before a dense module, in one process."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_fmp.gates.attach import attach_gates, feature_gates
from torchrec_fmp.gates.feature_gates import FeatureGates, GateConfig
from torchrec_fmp.gates.gated import GatedDense

FEATURES = ("a", "b", "c")


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def tables(dims: tuple[int, int, int], pooling: PoolingType) -> list[EmbeddingBagConfig]:
    """Feature b is served by two tables, and the first table by two features."""
    served = (["c", "b"], ["b"], ["a"])
    return [
        EmbeddingBagConfig(
            name=f"t{i}",
            embedding_dim=dim,
            num_embeddings=20,
            feature_names=features,
            pooling=pooling,
        )
        for i, (dim, features) in enumerate(zip(dims, served, strict=True))
    ]


def batch(size: int, weighted: bool = False) -> KeyedJaggedTensor:
    """0 to 3 ids per example, with keys in a different order from the tables."""
    generator = torch.Generator().manual_seed(size)
    lengths = torch.randint(0, 4, (3 * size,), generator=generator)
    total = int(lengths.sum())
    return KeyedJaggedTensor(
        keys=["b", "a", "c"],
        values=torch.randint(0, 20, (total,), generator=generator),
        lengths=lengths,
        weights=torch.rand(total, generator=generator) if weighted else None,
    )


class Reader(nn.Module):
    def __init__(self, collection: nn.Module) -> None:
        super().__init__()
        self.ebc = collection

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        return self.ebc(features).values()


@pytest.mark.parametrize("sampling", ["batch", "example"])
@pytest.mark.parametrize("dims", [(4, 4, 4), (4, 8, 2)], ids=["equal", "mixed"])
@pytest.mark.parametrize(
    ("pooling", "weighted"),
    [(PoolingType.SUM, False), (PoolingType.SUM, True), (PoolingType.MEAN, False)],
)
def test_open_gates_change_no_bit_of_a_collections_output_and_gradients(
    sampling: str, dims: tuple[int, int, int], pooling: PoolingType, weighted: bool
) -> None:
    plain = Reader(EmbeddingBagCollection(tables=tables(dims, pooling), is_weighted=weighted))
    gated = copy.deepcopy(plain)
    config = GateConfig(sampling=sampling)  # type: ignore[arg-type]
    attach_gates(gated, config)
    (_, gates), *_ = feature_gates(gated)
    gates.set_open(True)
    outputs = [model(batch(6, weighted)) for model in (plain, gated)]
    assert torch.equal(*outputs)
    for output in outputs:
        (output * output.detach().cos()).sum().backward()
    inner = gated.ebc._embedding_bag_collection
    for expected, computed in zip(plain.ebc.parameters(), inner.parameters(), strict=True):
        assert torch.equal(computed.grad, expected.grad)
    assert torch.equal(gates.log_alpha.grad, torch.zeros(3))


def dlrm() -> DLRM:
    torch.manual_seed(0)
    configs = tables((4, 4, 4), PoolingType.SUM)
    configs = [configs[0], configs[2]]
    return DLRM(EmbeddingBagCollection(tables=configs), 2, [8, 4], [8, 1])


def open_all(model: nn.Module) -> None:
    for _, gates in feature_gates(model):
        gates.set_open(True)


@pytest.mark.parametrize("training", [True, False])
def test_open_gates_change_no_bit_of_dlrm(training: bool) -> None:
    plain, gated = dlrm().train(training), dlrm().train(training)
    attach_gates(gated, GateConfig(), {"dense_arch": ["x", "y"]})
    open_all(gated)
    dense, features = draw(5, 2).float(), batch(5)
    outputs = [model(dense, features) for model in (plain, gated)]
    assert torch.equal(*outputs)
    for output in outputs:
        (output * output.detach().cos()).sum().backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    computed = {
        name.replace("_embedding_bag_collection.", "").replace("_module.", ""): parameter.grad
        for name, parameter in gated.named_parameters()
        if "gates" not in name
    }
    assert set(computed) == set(expected)
    assert all(torch.equal(computed[name], expected[name]) for name in expected)


def test_evaluation_scales_each_feature_by_its_deterministic_gate() -> None:
    gated = Reader(EmbeddingBagCollection(tables=tables((4, 8, 2), PoolingType.SUM)))
    plain = copy.deepcopy(gated)
    attach_gates(gated, GateConfig())
    (_, gates), *_ = feature_gates(gated)
    with torch.no_grad():
        gates.log_alpha.copy_(torch.tensor([-3.0, 0.4, 2.4]))
    values = dict(zip(gates.features, gates.values().tolist(), strict=True))
    assert gates.features == ("c", "b", "a")
    assert (values["c"], values["a"]) == (0.0, 1.0)
    expected = plain.ebc(batch(6))
    computed = gated.eval().ebc(batch(6))
    assert computed.keys() == expected.keys() == ["c", "b@t0", "b@t1", "a"]
    for key in computed.keys():
        gate = values[key.split("@")[0]]
        torch.testing.assert_close(computed[key], expected[key] * gate)
    assert torch.equal(computed["c"], torch.zeros(6, 4))


def test_training_forwards_draw_new_noise_and_count_the_steps() -> None:
    gated = Reader(EmbeddingBagCollection(tables=tables((4, 4, 4), PoolingType.SUM)))
    attach_gates(gated, GateConfig())
    outputs = [gated(batch(6)) for _ in range(2)]
    assert not torch.equal(*outputs)
    assert gated.ebc.step.value == 2


def test_a_gated_collection_exposes_the_properties_of_its_collection() -> None:
    collection = EmbeddingBagCollection(
        tables=tables((4, 4, 4), PoolingType.SUM), is_weighted=True, device=torch.device("meta")
    )
    gated = attach_gates(Reader(collection), GateConfig()).ebc
    assert gated.embedding_bag_configs() == collection.embedding_bag_configs()
    assert gated.is_weighted()
    assert gated.device == torch.device("meta")


def test_dense_gates_scale_the_columns_of_the_input() -> None:
    linear = nn.Linear(3, 2)
    gated = GatedDense(linear, FeatureGates(FEATURES, GateConfig(), name="dense"))
    gated.gates.fix({"a": 0.0, "b": 0.5, "c": 1.0})
    dense = draw(4, 3).float()
    assert torch.equal(gated(dense), linear(dense * torch.tensor([0.0, 0.5, 1.0])))


def test_a_dense_input_with_the_wrong_number_of_columns_is_refused() -> None:
    gated = GatedDense(nn.Linear(2, 1), FeatureGates(["x", "y"], GateConfig(), name="dense_arch"))
    with pytest.raises(ValueError, match="has 3 columns and 'dense_arch' has 2 gates: name every"):
        gated(torch.zeros(4, 3))


def test_gated_dlrm_trains_through_dlrm_train() -> None:
    model = DLRMTrain(dlrm())
    attach_gates(model, GateConfig(), {"model.dense_arch": ["x", "y"]})
    logits = model.model(draw(5, 2).float(), batch(5))
    loss = model.loss_fn(logits.squeeze(-1), torch.ones(5))
    loss.backward()
    for _, gates in feature_gates(model):
        assert gates.log_alpha.grad.abs().sum() > 0
