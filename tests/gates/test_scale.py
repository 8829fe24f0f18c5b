"""Multiplying embeddings by gates, against autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor

from torchrec_fmp.gates import scale
from torchrec_fmp.gates.feature_gates import FeatureGates, GateConfig
from torchrec_fmp.gates.scale import Scale, scale_keys, scale_sequences

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
    """Values (B, W), gates (K,) or (B, K), and the gradient of the output (B, W)."""
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
    scaled = Scale.apply(values, gates, lengths, False)
    assert torch.equal(scaled, plain)
    expected = torch.autograd.grad(plain, (values, gates), grad)
    computed = torch.autograd.grad(scaled, (values, gates), grad)
    torch.testing.assert_close(computed, expected, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=60)
@scalings
def test_centering_removes_the_batch_mean_from_the_gradient_of_the_gates_only(
    lengths: list[int], batch_size: int, per_example: bool, seed: int
) -> None:
    values, gates, grad = scaling(lengths, batch_size, per_example, seed)
    plain = values * columns(gates, lengths)
    deviation = (values - values.mean(0)).detach()
    (expected_values,) = torch.autograd.grad(plain, values, grad)
    (expected_gates,) = torch.autograd.grad(deviation * columns(gates, lengths), gates, grad)

    scaled = Scale.apply(values, gates, lengths, True)
    assert torch.equal(scaled, plain)
    computed_values, computed_gates = torch.autograd.grad(scaled, (values, gates), grad)
    torch.testing.assert_close(computed_values, expected_values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(computed_gates, expected_gates, rtol=1e-11, atol=1e-11)


def test_scaling_computes_only_the_requested_gradients() -> None:
    values, gates, grad = scaling([2, 3], 4, False, 0)
    scaled = Scale.apply(values.detach(), gates, [2, 3], True)
    assert torch.autograd.grad(scaled, gates, grad)[0].shape == (2,)
    scaled = Scale.apply(values, gates.detach(), [2, 3], True)
    assert torch.autograd.grad(scaled, values, grad)[0].shape == (4, 5)


@pytest.mark.parametrize("per_example", [False, True])
def test_keys_find_the_gate_of_their_feature_in_any_order_and_with_a_table_name(
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


def test_chunks_of_the_backward_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    values, gates, grad = scaling([2, 3], 5, True, 0)
    whole = torch.autograd.grad(Scale.apply(values, gates, [2, 3], True), (values, gates), grad)
    monkeypatch.setattr(scale, "_CPU_CHUNK_ELEMENTS", 10)
    assert len(scale._chunks(grad)) == 3
    chunked = torch.autograd.grad(Scale.apply(values, gates, [2, 3], True), (values, gates), grad)
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-12)


def test_an_index_cached_in_inference_mode_works_in_training() -> None:
    scale._index.cache_clear()
    embeddings = KeyedTensor(["b", "a"], [1, 2], draw(3, 3))
    with torch.inference_mode():
        scale_keys(embeddings, FEATURES, draw(3), True)
    gates = draw(3).requires_grad_()
    scale_keys(embeddings, FEATURES, gates, True).values().sum().backward()
    assert gates.grad is not None


# Lengths of four examples; the second is empty.
LENGTHS = {"a": torch.tensor([2, 0, 1, 3]), "b": torch.tensor([1, 0, 2, 0], dtype=torch.int32)}


def sequences() -> dict[str, JaggedTensor]:
    """Feature b is served by two tables."""
    return {
        key: JaggedTensor(
            values=draw(int(LENGTHS[key[0]].sum()), 3, seed=seed).requires_grad_(),
            lengths=LENGTHS[key[0]],
            weights=torch.arange(int(LENGTHS[key[0]].sum())),
        )
        for seed, key in enumerate(("b@t0", "a", "b@t1"))
    }


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("per_example", [False, True])
def test_a_sequence_is_scaled_by_the_gate_of_its_example_and_sums_its_gradients(
    per_example: bool, centered: bool
) -> None:
    # One more feature than the collection reads, as when collections share gates.
    features = ("c", "b", "a")
    gates = (draw(4, 3) if per_example else draw(3)).requires_grad_()
    inputs = sequences()
    scaled = scale_sequences(inputs, features, gates, centered)
    assert list(scaled) == list(inputs)
    expected_gates = torch.zeros_like(gates)
    for seed, (key, sequence) in enumerate(inputs.items()):
        grad = draw(*sequence.values().shape, seed=10 + seed)
        scaled[key].values().backward(grad, retain_graph=True)
        column = features.index(key[0])
        position = 0
        for example, length in enumerate(LENGTHS[key[0]].tolist()):
            rows = slice(position, position + length)
            gate = gates[example, column] if per_example else gates[column]
            values, mean = sequence.values(), sequence.values().mean(0)
            assert torch.equal(scaled[key].values()[rows], values[rows] * gate)
            assert torch.equal(values.grad[rows], grad[rows] * gate)
            deviation = values[rows] - mean if centered else values[rows]
            dots = (grad[rows] * deviation).sum().detach()
            expected_gates[(example, column) if per_example else column] += dots
            position += length
        assert torch.equal(scaled[key].lengths(), sequence.lengths())
        assert torch.equal(scaled[key].weights(), sequence.weights())
    torch.testing.assert_close(gates.grad, expected_gates)


def test_a_feature_without_positions_has_a_zero_gradient() -> None:
    empty = JaggedTensor(torch.empty(0, 3, requires_grad=True), lengths=torch.zeros(2).int())
    gates = torch.ones(2, 1, requires_grad=True)
    scale_sequences({"a": empty}, ["a"], gates, True)["a"].values().sum().backward()
    assert torch.equal(gates.grad, torch.zeros(2, 1))
