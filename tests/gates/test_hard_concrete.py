"""The distribution against its own definition, integrated numerically in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchrec_fmp.gates.hard_concrete import HardConcrete

DEFAULT = HardConcrete()

log_alphas = st.floats(-6, 6)
distributions = st.builds(
    HardConcrete,
    temperature=st.floats(0.3, 2),
    gamma=st.floats(-0.5, -0.02),
    zeta=st.floats(1.02, 1.5),
)

# Midpoints of 200,000 intervals of u: the rule's error is below 1e-5 for these integrands.
MIDPOINTS = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000


def reference_gate(shape: HardConcrete, log_alpha: Tensor, u: Tensor) -> Tensor:
    """z as the paper defines it, float64."""
    s = torch.sigmoid((torch.log(u) - torch.log1p(-u) + log_alpha) / shape.temperature)
    return (s * (shape.zeta - shape.gamma) + shape.gamma).clamp(0, 1)


def derivative(value: Tensor, log_alpha: Tensor) -> float:
    return torch.autograd.grad(value, log_alpha)[0].sum().item()


@settings(max_examples=40, deadline=None)
@given(shape=distributions, log_alpha=log_alphas)
def test_open_probability_is_the_integral_of_z_above_0(
    shape: HardConcrete, log_alpha: float
) -> None:
    z = reference_gate(shape, torch.tensor(log_alpha, dtype=torch.float64), MIDPOINTS)
    computed = shape.open_probability(torch.tensor([log_alpha])).item()
    assert computed == pytest.approx((z > 0).double().mean().item(), abs=2e-5)


@settings(max_examples=40, deadline=None)
@given(shape=distributions, log_alpha=log_alphas)
def test_gradient_of_open_probability_matches_the_integral(
    shape: HardConcrete, log_alpha: float
) -> None:
    computed_at = torch.tensor([log_alpha], requires_grad=True)
    computed = derivative(shape.open_probability(computed_at).sum(), computed_at)

    def integral(at: float) -> float:
        # The integrand is a step, so the gradient is a difference of integrals. A grid of u would
        # round it; the measure of {u: z(u) > 0} is exact where z leaves 0.
        low, high = torch.tensor(-60.0, dtype=torch.float64), torch.tensor(60.0).double()
        for _ in range(80):
            middle = (low + high) / 2
            z = reference_gate(shape, torch.tensor(at, dtype=torch.float64), torch.sigmoid(middle))
            low, high = (low, middle) if z > 0 else (middle, high)
        return torch.sigmoid(-high).item()

    reference = (integral(log_alpha + 1e-4) - integral(log_alpha - 1e-4)) / 2e-4
    assert computed == pytest.approx(reference, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(shape=distributions, log_alpha=log_alphas, power=st.sampled_from([1, 2]))
def test_moments_of_the_samples_and_their_gradients_match_the_integrals(
    shape: HardConcrete, log_alpha: float, power: int
) -> None:
    computed_at = torch.tensor([log_alpha], requires_grad=True)
    z = shape.sample(computed_at, MIDPOINTS.float()[:, None])
    assert z.shape == (len(MIDPOINTS), 1)
    computed = (z.double() ** power).mean()

    exact_at = torch.tensor(log_alpha, dtype=torch.float64, requires_grad=True)
    reference = (reference_gate(shape, exact_at, MIDPOINTS) ** power).mean()

    assert computed.item() == pytest.approx(reference.item(), abs=2e-5)
    assert derivative(computed, computed_at) == pytest.approx(
        derivative(reference, exact_at), abs=1e-4
    )


@given(shape=distributions)
def test_deterministic_gate_is_exactly_0_or_1_beyond_its_thresholds_and_only_there(
    shape: HardConcrete,
) -> None:
    closed = torch.tensor([shape.closed_log_alpha])
    opened = torch.tensor([shape.open_log_alpha])
    # fp32 cannot hold the thresholds of every shape exactly, nor the gate that it computes there.
    beyond = torch.tensor([1e-4, 0.5, 3.0, 50.0])
    assert (shape.deterministic(closed - beyond) == 0).all()
    assert (shape.deterministic(opened + beyond) == 1).all()
    between = shape.deterministic(torch.cat([closed + 0.01, opened - 0.01]))
    assert ((between > 0) & (between < 1)).all()


def test_default_gate_is_exact_at_the_thresholds_themselves() -> None:
    assert DEFAULT.deterministic(torch.tensor([DEFAULT.closed_log_alpha])).item() == 0
    assert DEFAULT.deterministic(torch.tensor([DEFAULT.open_log_alpha])).item() == 1


def test_default_thresholds_match_the_design() -> None:
    assert DEFAULT.closed_log_alpha == pytest.approx(-2.398, abs=5e-4)
    assert DEFAULT.open_log_alpha == pytest.approx(2.398, abs=5e-4)
    even = torch.tensor([DEFAULT.temperature * DEFAULT.closed_log_alpha])
    assert even.item() == pytest.approx(-1.599, abs=5e-4)
    assert DEFAULT.open_probability(even).item() == pytest.approx(0.5, abs=1e-6)


@given(log_alpha=log_alphas)
def test_deterministic_gate_is_the_stretched_sigmoid(log_alpha: float) -> None:
    exact = min(1.0, max(0.0, 1.2 / (1 + math.exp(-log_alpha)) - 0.1))
    assert DEFAULT.deterministic(torch.tensor([log_alpha])).item() == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("log_alpha", [-1e30, -100.0, 0.0, 100.0, 1e30])
def test_extreme_noise_and_parameters_give_finite_gates_and_gradients(
    dtype: torch.dtype, log_alpha: float
) -> None:
    parameter = torch.full((4,), log_alpha, dtype=dtype, requires_grad=True)
    # In bf16 the third rounds to 1.
    uniform = torch.tensor([0.0, 1.0, 1 - 1e-6, 1e-30], dtype=dtype)
    for z in (
        DEFAULT.sample(parameter, uniform),
        DEFAULT.deterministic(parameter),
        DEFAULT.open_probability(parameter),
    ):
        assert z.dtype == torch.float32
        assert torch.isfinite(z).all()
        assert ((z >= 0) & (z <= 1)).all()
        (grad,) = torch.autograd.grad(z.sum(), parameter)
        assert torch.isfinite(grad).all()


def test_extreme_noise_reaches_exact_0_and_exact_1() -> None:
    z = DEFAULT.sample(torch.zeros(2), torch.tensor([0.0, 1.0]))
    assert z.tolist() == [0.0, 1.0]


def test_noise_is_bounded_so_no_draw_opens_a_gate_far_below_its_threshold() -> None:
    # The largest logit of the noise is log(1e6), about 13.8.
    assert DEFAULT.sample(torch.tensor([-20.0]), torch.tensor([1.0])).item() == 0
    assert DEFAULT.sample(torch.tensor([20.0]), torch.tensor([0.0])).item() == 1


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; it must be positive and finite"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"gamma": 0.0}, "gamma is 0.0 and zeta is 1.1; they must satisfy gamma < 0 and zeta > 1"),
        ({"gamma": -math.inf}, "gamma is -inf"),
        ({"zeta": 1.0}, "zeta is 1.0"),
        ({"zeta": math.nan}, "zeta is nan"),
    ],
)
def test_an_invalid_shape_is_refused(shape: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HardConcrete(**shape)
