"""The module that holds the gates: its states, its noise, its bounds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchrec_fmp.gates.feature_gates import FeatureGates, GateConfig
from torchrec_fmp.gates.hard_concrete import HardConcrete

FEATURES = ("a", "b", "c")
# Gates that are sampled strictly between 0 and 1, so that equal values mean equal noise.
SMOOTH = HardConcrete(temperature=10.0)
BATCH_SIZE = 5


def build(**config: object) -> FeatureGates:
    name = str(config.pop("name", "arch.ebc"))
    return FeatureGates(FEATURES, GateConfig(**config), name=name)  # type: ignore[arg-type]


def noise(step: int = 3, **config: object) -> Tensor:
    return build(distribution=SMOOTH, **config)(step, BATCH_SIZE).detach()


@pytest.mark.parametrize(("sampling", "shape"), [("batch", (3,)), ("example", (BATCH_SIZE, 3))])
def test_sampled_gates_lie_between_0_and_1_and_have_the_shape_of_the_sampling(
    sampling: str, shape: tuple[int, ...]
) -> None:
    z = build(sampling=sampling)(0, BATCH_SIZE)
    assert z.shape == shape
    assert z.dtype == torch.float32
    assert ((z >= 0) & (z <= 1)).all()
    assert z.requires_grad


@pytest.mark.parametrize("sampling", ["batch", "example"])
def test_noise_neither_uses_nor_changes_the_global_generator(sampling: str) -> None:
    torch.manual_seed(0)
    expected_global = torch.rand(4)
    torch.manual_seed(0)
    first = noise(sampling=sampling)
    assert torch.equal(torch.rand(4), expected_global)
    torch.manual_seed(99)
    assert torch.equal(noise(sampling=sampling), first)


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(6)))
def test_noise_of_a_step_does_not_depend_on_the_order_of_calls(order: list[int]) -> None:
    gates = build(distribution=SMOOTH)
    by_step = {step: gates(step, BATCH_SIZE) for step in order}
    assert all(torch.equal(by_step[step], noise(step)) for step in order)


def on_rank(rank: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: True)
        patch.setattr(dist, "get_rank", lambda: rank)
        return noise()


@pytest.mark.parametrize(
    ("key", "other"),
    [
        ("seed", lambda _: noise(seed=1)),
        ("step", lambda _: noise(step=4)),
        ("name", lambda _: noise(name="arch.other")),
        ("rank", lambda monkeypatch: on_rank(1, monkeypatch)),
    ],
)
def test_noise_depends_on_each_of_seed_step_rank_and_name(
    key: str, other: Callable[[pytest.MonkeyPatch], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert torch.equal(noise(), on_rank(0, monkeypatch))
    assert (other(monkeypatch) != noise()).all(), key


def test_noise_differs_between_examples_and_features() -> None:
    assert noise(sampling="example").unique().numel() == BATCH_SIZE * len(FEATURES)


def test_open_gates_are_exactly_1_with_a_zero_gradient_and_later_sample_as_before() -> None:
    gates = build()
    sampled = gates(0, BATCH_SIZE)
    gates.set_open(True)
    z = gates(0, BATCH_SIZE)
    assert torch.equal(z, torch.ones(3))
    z.sum().backward()
    # A gradient of None would differ from step to step in DistributedDataParallel's static graph.
    assert gates.log_alpha.grad is not None
    assert torch.equal(gates.log_alpha.grad, torch.zeros(3))
    gates.set_open(False)
    assert torch.equal(gates(0, BATCH_SIZE), sampled)


@pytest.mark.parametrize("training", [True, False])
def test_fixed_gates_have_the_values_of_the_selection_until_released(training: bool) -> None:
    gates = build().train(training)
    before = gates(0, BATCH_SIZE)
    gates.fix({"c": 0.25, "a": 1.0, "b": 0.0, "of another module": 0.5})
    gates.set_open(True)
    assert gates(0, BATCH_SIZE).tolist() == [1.0, 0.0, 0.25]
    assert gates.values().tolist() == [1.0, 0.0, 0.25]
    gates.set_open(False)
    gates.fix(None)
    assert torch.equal(gates(0, BATCH_SIZE), before)


def test_a_selection_that_lacks_a_feature_is_refused() -> None:
    with pytest.raises(KeyError, match="c"):
        build().fix({"a": 1.0, "b": 0.0})


def test_evaluation_is_deterministic() -> None:
    gates = build().eval()
    with torch.no_grad():
        gates.log_alpha.copy_(torch.tensor([-3.0, 0.5, 3.0]))
    z = [gates(step, BATCH_SIZE) for step in range(3)]
    assert all(torch.equal(gates.values(), each) for each in z)
    assert torch.equal(gates.values(), gates.config.distribution.deterministic(gates.log_alpha))
    assert gates.values()[[0, 2]].tolist() == [0.0, 1.0]
    assert not gates.values().requires_grad


def test_resumed_gates_have_the_same_parameters_and_noise() -> None:
    first = build()
    with torch.no_grad():
        first.log_alpha.copy_(torch.tensor([0.1, -0.2, 0.3]))
    resumed = build()
    resumed.load_state_dict(first.state_dict())
    assert set(first.state_dict()) == {"log_alpha"}
    assert torch.equal(resumed(7, BATCH_SIZE), first(7, BATCH_SIZE))


def test_clamp_brings_log_alpha_back_into_its_bounds_and_no_further() -> None:
    gates = build(log_alpha_bounds=(-3.0, 4.0))
    with torch.no_grad():
        gates.log_alpha.copy_(torch.tensor([-9.0, 0.5, 9.0]))
    gates.clamp_()
    assert gates.log_alpha.tolist() == [-3.0, 0.5, 4.0]


def test_default_bounds_allow_exactly_closed_and_exactly_open_gates() -> None:
    gates = build()
    for bound, value in zip(gates.config.log_alpha_bounds, (0.0, 1.0), strict=True):
        torch.nn.init.constant_(gates.log_alpha, bound)
        assert gates.values().tolist() == [value] * 3


def test_reset_returns_every_gate_to_its_initial_value() -> None:
    gates = build(initial_log_alpha=0.75)
    assert gates.log_alpha.tolist() == [0.75] * 3
    torch.nn.init.zeros_(gates.log_alpha)
    gates.reset_parameters()
    assert gates.log_alpha.tolist() == [0.75] * 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"log_alpha_bounds": (-2.0, 3.0)},
            "log_alpha_bounds are -2.0 and 3.0; they must reach from -2.398, .* to 2.398",
        ),
        ({"log_alpha_bounds": (-3.0, 2.0)}, "must reach from -2.398"),
        ({"log_alpha_bounds": (3.0, -3.0)}, "must reach from -2.398"),
        ({"initial_log_alpha": 2.6}, "initial_log_alpha is 2.6; it must be within .*-4.0.*2.5"),
        ({"initial_log_alpha": float("nan")}, "initial_log_alpha is nan"),
    ],
)
def test_invalid_initial_log_alpha_or_bounds_are_refused(
    config: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        GateConfig(**config)  # type: ignore[arg-type]


def test_values_are_the_gates_that_evaluation_uses() -> None:
    gates = FeatureGates(("a", "b"), GateConfig(), name="x").eval()
    for is_open in (True, False):
        gates.set_open(is_open)
        assert torch.equal(gates.values(), gates(0, 4))
