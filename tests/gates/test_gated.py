"""Gates behind the lookup and in front of a dense module, in one process."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_fmp.gates.attach import attach_gates, feature_gates
from torchrec_fmp.gates.feature_gates import FeatureGates, GateConfig
from torchrec_fmp.gates.gated import GatedDense, _Scale, scale_keys

FEATURES = ("a", "b", "c")


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def columns(gates: Tensor, lengths: list[int]) -> Tensor:
    """(K,) or (B, K) -> (W,) or (B, W)."""
    repeated = [
        gate.unsqueeze(-1).expand(*gate.shape, length)
        for gate, length in zip(gates.unbind(-1), lengths, strict=True)
    ]
    return torch.cat(repeated, dim=-1)


scalings = given(
    # Equal and mixed dimensions take different paths.
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4)
    | st.tuples(st.integers(1, 5), st.integers(1, 4)).map(lambda pair: [pair[0]] * pair[1]),
    batch_size=st.integers(1, 6),
    per_example=st.booleans(),
    seed=st.integers(0, 1000),
)


def scaling(
    lengths: list[int], batch_size: int, per_example: bool, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Values (B, W), gates (K,) or (B, K), and what the backward starts from, (B, W)."""
    shape = (batch_size, len(lengths)) if per_example else (len(lengths),)
    values = draw(batch_size, sum(lengths), seed=seed).requires_grad_()
    gates = draw(*shape, seed=seed + 1).requires_grad_()
    return values, gates, draw(batch_size, sum(lengths), seed=seed + 2)


@settings(deadline=None, max_examples=60)
@scalings
def test_scaling_without_centering_is_the_plain_product_forward_and_backward(
    lengths: list[int], batch_size: int, per_example: bool, seed: int
) -> None:
    values, gates, grad = scaling(lengths, batch_size, per_example, seed)
    plain = values * columns(gates, lengths)
    scaled = _Scale.apply(values, gates, lengths, False)
    assert torch.equal(scaled, plain)
    expected = torch.autograd.grad(plain, (values, gates), grad)
    computed = torch.autograd.grad(scaled, (values, gates), grad)
    torch.testing.assert_close(computed, expected, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=60)
@scalings
def test_centering_takes_the_batch_mean_out_of_the_gates_gradient_and_of_nothing_else(
    lengths: list[int], batch_size: int, per_example: bool, seed: int
) -> None:
    values, gates, grad = scaling(lengths, batch_size, per_example, seed)
    plain = values * columns(gates, lengths)
    deviation = (values - values.mean(0)).detach()
    (expected_values,) = torch.autograd.grad(plain, values, grad)
    (expected_gates,) = torch.autograd.grad(deviation * columns(gates, lengths), gates, grad)

    scaled = _Scale.apply(values, gates, lengths, True)
    assert torch.equal(scaled, plain)
    computed_values, computed_gates = torch.autograd.grad(scaled, (values, gates), grad)
    torch.testing.assert_close(computed_values, expected_values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(computed_gates, expected_gates, rtol=1e-11, atol=1e-11)


def test_scaling_computes_only_the_gradients_that_are_asked_for() -> None:
    values, gates, grad = scaling([2, 3], 4, False, 0)
    scaled = _Scale.apply(values.detach(), gates, [2, 3], True)
    assert torch.autograd.grad(scaled, gates, grad)[0].shape == (2,)
    scaled = _Scale.apply(values, gates.detach(), [2, 3], True)
    assert torch.autograd.grad(scaled, values, grad)[0].shape == (4, 5)


@pytest.mark.parametrize("per_example", [False, True])
def test_keys_find_the_gate_of_their_feature_in_any_order_and_behind_a_table_name(
    per_example: bool,
) -> None:
    keys, lengths = ["b@t0", "c", "b@t1", "a"], [1, 2, 3, 2]
    values = draw(4, 8)
    gates = draw(4, 3, seed=1) if per_example else draw(3, seed=1)
    scaled = scale_keys(KeyedTensor(keys, lengths, values), FEATURES, gates, centered=True)
    assert (scaled.keys(), scaled.length_per_key()) == (keys, lengths)
    by_key = KeyedTensor(keys, lengths, values).to_dict()
    for key, feature in zip(keys, (1, 2, 1, 0), strict=True):
        assert torch.equal(scaled[key], by_key[key] * gates[..., feature : feature + 1]), key


def test_gate_of_a_feature_of_two_tables_sums_the_gradients_of_both() -> None:
    values, gates = draw(4, 5), torch.ones(2, dtype=torch.float64, requires_grad=True)
    embeddings = KeyedTensor(["a@t0", "b", "a@t1"], [2, 1, 2], values)
    scale_keys(embeddings, ["a", "b"], gates, centered=False).values().sum().backward()
    sums = values.sum(0)
    expected = torch.stack([sums[[0, 1, 3, 4]].sum(), sums[2]])
    torch.testing.assert_close(gates.grad, expected)


def test_scaled_embeddings_keep_their_dtype() -> None:
    embeddings = KeyedTensor(["a"], [2], draw(3, 2).to(torch.bfloat16))
    assert scale_keys(embeddings, ["a"], torch.tensor([0.5]), True).values().dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("sampling", "centered"),
    [("batch", False), ("batch", True), ("example", False), ("example", True)],
)
def test_an_empty_batch_gives_zero_gradients(sampling: str, centered: bool) -> None:
    config = GateConfig(sampling=sampling, centered=centered)  # type: ignore[arg-type]
    gates = FeatureGates(FEATURES, config, name="x")
    embeddings = KeyedTensor(list(FEATURES), [2, 2, 2], torch.empty(0, 6, requires_grad=True))
    scale_keys(embeddings, FEATURES, gates(0, 0), centered).values().sum().backward()
    assert torch.equal(gates.log_alpha.grad, torch.zeros(3))


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
    """0 to 3 ids an example, keys in another order than the tables'."""
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
    assert next(feature_gates(gated))[1].step.item() == 2


def test_gates_pass_the_collections_properties_on() -> None:
    collection = EmbeddingBagCollection(
        tables=tables((4, 4, 4), PoolingType.SUM), is_weighted=True, device=torch.device("meta")
    )
    gated = attach_gates(Reader(collection), GateConfig()).ebc
    assert gated.embedding_bag_configs() == collection.embedding_bag_configs()
    assert gated.is_weighted()
    assert gated.device == torch.device("meta")


def test_dense_gates_scale_the_columns_of_the_modules_input() -> None:
    linear = nn.Linear(3, 2)
    gated = GatedDense(linear, FeatureGates(FEATURES, GateConfig(), name="dense"))
    gated.gates.fix({"a": 0.0, "b": 0.5, "c": 1.0})
    dense = draw(4, 3).float()
    assert torch.equal(gated(dense), linear(dense * torch.tensor([0.0, 0.5, 1.0])))


def test_a_dense_input_with_another_number_of_columns_is_refused() -> None:
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
