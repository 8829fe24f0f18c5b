"""The penalties' values and gradients, and the gates they lead to."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from torchrec_fmp.gates.feature_gates import FeatureGates, GateConfig
from torchrec_fmp.gates.penalty import L0Penalty, TargetPenalty, TargetTerm

CONFIG = GateConfig()
LOW, HIGH = CONFIG.log_alpha_bounds


def gates_at(*modules: list[float]) -> list[FeatureGates]:
    gates = []
    for index, log_alphas in enumerate(modules):
        names = [f"f{index}_{i}" for i in range(len(log_alphas))]
        gates.append(FeatureGates(names, CONFIG, name=str(index)))
        with torch.no_grad():
            gates[-1].log_alpha.copy_(torch.tensor(log_alphas))
    return gates


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0])
def test_l0_penalty_is_the_weighted_sum_of_open_probabilities_over_all_modules(
    strength: float,
) -> None:
    gates = gates_at([-1.599, 1.0], [0.3])
    value = L0Penalty(weight=0.02)(gates, strength)
    shift = 2 / 3 * math.log(0.1 / 1.1)
    p = [1 / (1 + math.exp(shift - log_alpha)) for log_alpha in (-1.599, 1.0, 0.3)]
    assert value.shape == ()
    assert value.item() == pytest.approx(0.02 * strength * sum(p), rel=1e-5)
    value.backward()
    grads = torch.cat([module.log_alpha.grad for module in gates]).tolist()
    assert grads == pytest.approx([0.02 * strength * x * (1 - x) for x in p], rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("weight", [-1e-3, math.nan, math.inf])
def test_invalid_l0_weight_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=f"weight is {weight}; it must be finite and at least 0"):
        L0Penalty(weight)


@settings(max_examples=40, deadline=None)
@given(closed=st.integers(0, 20), opened=st.integers(1, 20), learning_rate=st.floats(0.01, 10))
def test_target_is_met_with_its_share_at_the_upper_bound_and_the_rest_at_the_lower(
    closed: int, opened: int, learning_rate: float
) -> None:
    gates = gates_at([LOW] * closed + [HIGH] * opened)
    penalty = TargetPenalty(keep=opened / (closed + opened), learning_rate=learning_rate).start()
    value = penalty(gates, strength=1.0)
    assert value.item() == pytest.approx(0, abs=1e-9)
    # The multipliers sum the excess, so they show that it is 0; a value of 0 alone does not.
    assert penalty.multipliers == pytest.approx((0, 0), abs=1e-6 * learning_rate)


@settings(max_examples=40, deadline=None)
@given(
    log_alphas=st.lists(st.floats(LOW, HIGH), min_size=1, max_size=10),
    keep=st.floats(0.05, 1),
    strength=st.floats(0, 1),
)
def test_target_penalty_is_the_augmented_lagrangian_of_the_excess(
    log_alphas: list[float], keep: float, strength: float
) -> None:
    gates = gates_at(log_alphas)
    penalty = TargetPenalty(keep, learning_rate=0.5).start()
    low, high = CONFIG.distribution.open_probability(torch.tensor([LOW, HIGH])).tolist()
    share = (gates[0].open_probability().mean().item() - low) / (high - low)
    excess = share - (1 + strength * (keep - 1))
    linear = quadratic = 0.0
    for _ in range(3):
        value = penalty(gates, strength).item()
        if strength > 0:
            linear, quadratic = linear + 0.5 * excess, quadratic + 0.5 * excess**2
        assert value == pytest.approx(linear * excess + quadratic * excess**2, abs=1e-5)
    assert penalty.multipliers == pytest.approx((linear, quadratic), abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(log_alpha=st.floats(LOW, HIGH), keep=st.floats(0.05, 1))
def test_the_linear_multiplier_follows_the_excess_and_the_quadratic_always_rises(
    log_alpha: float, keep: float
) -> None:
    gates = gates_at([log_alpha] * 4)
    low, high = CONFIG.distribution.open_probability(torch.tensor([LOW, HIGH])).tolist()
    excess = (gates[0].open_probability().mean().item() - low) / (high - low) - keep
    assume(abs(excess) > 1e-3)
    penalty = TargetPenalty(keep).start()
    seen = [(0.0, 0.0)]
    for _ in range(3):
        penalty(gates, 1.0)
        seen.append(penalty.multipliers)
    linear, quadratic = zip(*seen, strict=True)
    assert all((b > a) == (excess > 0) for a, b in zip(linear, linear[1:], strict=False))
    assert all(b > a for a, b in zip(quadratic, quadratic[1:], strict=False))


def test_target_penalty_with_zero_strength_has_no_effect() -> None:
    gates = gates_at([1.0, -1.0])
    penalty = TargetPenalty(keep=0.5).start()
    value = penalty(gates, strength=0.0)
    value.backward()
    assert value.item() == 0
    assert penalty.multipliers == (0.0, 0.0)
    assert torch.equal(gates[0].log_alpha.grad, torch.zeros(2))


@pytest.mark.parametrize("keep", [0.25, 0.5])
def test_toy_optimisation_keeps_the_target_share_and_the_most_useful_features(keep: float) -> None:
    count = 12
    names = [str(i) for i in range(count)]
    gates = FeatureGates(names, GateConfig(sampling="example"), name="toy")
    # Increase of the task loss when feature i closes.
    usefulness = torch.linspace(0.01, 0.12, count)
    term = TargetPenalty(keep, learning_rate=0.05).start()
    optimizer = torch.optim.Adam([gates.log_alpha], lr=0.05)
    for step in range(600):
        optimizer.zero_grad()
        task_loss = -(usefulness * gates(step, 64).mean(0)).sum()
        (task_loss + term([gates], min(1.0, step / 100))).backward()
        optimizer.step()
        gates.clamp_()
    kept = (gates.values() > 0).nonzero().squeeze(1).tolist()
    assert kept == list(range(count - round(keep * count), count))


@settings(max_examples=40, deadline=None)
@given(
    log_alphas=st.lists(st.floats(LOW, HIGH), min_size=2, max_size=6),
    cost=st.floats(0.1, 1e9),
)
def test_equal_costs_act_like_no_costs_and_the_excess_is_a_share_of_the_cost(
    log_alphas: list[float], cost: float
) -> None:
    gates = gates_at(log_alphas)
    names = gates[0].features
    plain = TargetPenalty(0.5).start()
    equal = TargetPenalty(0.5, costs=dict.fromkeys(names, cost)).start()
    one_cost = TargetPenalty(0.5, costs={names[0]: cost})
    one = one_cost.start()
    for penalty in (plain, equal, one):
        penalty(gates, 1.0)
    assert equal.multipliers == pytest.approx(plain.multipliers, abs=1e-7)
    low, high = CONFIG.distribution.open_probability(torch.tensor([LOW, HIGH])).tolist()
    share = (gates[0].open_probability()[0].item() - low) / (high - low)
    assert one.multipliers[0] == pytest.approx(one_cost.learning_rate * (share - 0.5), abs=1e-7)


def test_costs_decide_which_features_close_and_free_features_stay_open() -> None:
    # One wide feature, four narrow ones, each less useful, and a free one that is hardly useful.
    names = ["wide", "n0", "n1", "n2", "n3", "free"]
    usefulness = torch.tensor([0.12, 0.06, 0.07, 0.08, 0.09, 0.001])
    costs = {"wide": 60.0, "n0": 10.0, "n1": 10.0, "n2": 10.0, "n3": 10.0}
    kept = {}
    for kind, penalty in (
        ("count", TargetPenalty(0.5, learning_rate=0.02)),
        ("cost", TargetPenalty(0.4, learning_rate=0.02, costs=costs)),
    ):
        term = penalty.start()
        config = GateConfig(initial_log_alpha=1.5, sampling="example")
        gates = FeatureGates(names, config, name="toy")
        optimizer = torch.optim.Adam([gates.log_alpha], lr=0.05)
        for step in range(600):
            optimizer.zero_grad()
            task_loss = -(usefulness * gates(step, 64).mean(0)).sum()
            (task_loss + term([gates], min(1.0, step / 100))).backward()
            optimizer.step()
            gates.clamp_()
        open_gates = (gates.values() > 0).tolist()
        kept[kind] = [name for name, is_open in zip(names, open_gates, strict=True) if is_open]
    assert kept == {"count": ["wide", "n2", "n3"], "cost": ["n0", "n1", "n2", "n3", "free"]}


def test_a_unit_is_priced_by_the_model_unless_costs_were_given() -> None:
    def costs(unit: str) -> dict[str, float]:
        return {"f0_0": {"features": 1.0, "bytes": 3.0, "hbm": 5.0, "step_ms": 7.0}[unit]}

    own = TargetPenalty(0.5, unit="hbm", costs={"f0_0": 2.0}).priced(costs)
    assert isinstance(own, TargetPenalty)
    assert own.costs == {"f0_0": 2.0}
    bytes_penalty = TargetPenalty(0.3, 0.2, "bytes")
    with pytest.raises(ValueError, match=r"costs\(model, topology, 'bytes'\)"):
        bytes_penalty.start()(gates_at([0.0]), 1.0)
    priced = bytes_penalty.priced(costs)
    assert isinstance(priced, TargetPenalty)
    assert (priced.keep, priced.learning_rate, priced.costs) == (0.3, 0.2, {"f0_0": 3.0})


def test_each_start_of_a_penalty_has_separate_multipliers() -> None:
    penalty = TargetPenalty(0.5).priced(lambda unit: {"f0_0": 1.0, "f0_1": 1.0})
    assert isinstance(penalty, TargetPenalty)
    first = penalty.start()
    first(gates_at([HIGH, HIGH]), 1.0)
    second = penalty.start()
    assert first.multipliers > (0.0, 0.0) == second.multipliers


def test_a_restored_term_continues_like_the_saved_one() -> None:
    penalty = TargetPenalty(0.3, learning_rate=0.5)
    term = penalty.start()
    gates = gates_at([1.0, -1.0, HIGH])
    for _ in range(3):
        term(gates, 1.0)
    restored = penalty.start()
    restored.load_state_dict(json.loads(json.dumps(term.state_dict())))
    assert restored.multipliers == term.multipliers != (0.0, 0.0)
    assert restored(gates, 1.0).item() == term(gates, 1.0).item()


def test_the_state_of_another_penalty_is_refused() -> None:
    with pytest.raises(ValueError, match=r"L0Penalty keeps no state, but got \['linear'"):
        L0Penalty().load_state_dict(TargetPenalty(0.5).start().state_dict())
    with pytest.raises(ValueError, match=r"linear and quadratic, but got \[\]"):
        TargetPenalty(0.5).start().load_state_dict(L0Penalty().state_dict())


@settings(max_examples=40, deadline=None)
@given(
    gone=st.integers(0, 5),
    closed=st.integers(0, 5),
    opened=st.integers(1, 5),
    strength=st.floats(0.01, 1),
    by_cost=st.booleans(),
)
def test_dropped_features_count_as_closed_and_the_target_falls_from_the_remaining_cost(
    gone: int, closed: int, opened: int, strength: float, by_cost: bool
) -> None:
    costs = {f"f0_{i}": 1.0 + i * by_cost for i in range(closed + opened)}
    all_costs = {**{f"gone_{i}": 2.0 + i * by_cost for i in range(gone)}, **costs}
    total = sum(all_costs.values())
    target = sum(costs[f"f0_{i}"] for i in range(closed, closed + opened)) / total

    def penalty() -> TargetTerm:
        asked = TargetPenalty(0.9, learning_rate=1.0).priced(lambda _: all_costs, lambda _: target)
        assert isinstance(asked, TargetPenalty)
        return asked.start()

    met = penalty()
    met(gates_at([LOW] * closed + [HIGH] * opened), strength=1.0)
    assert met.multipliers == pytest.approx((0, 0), abs=1e-6)
    falling = penalty()
    falling(gates_at([HIGH] * (closed + opened)), strength)
    left = sum(costs.values()) / total
    assert falling.multipliers[0] == pytest.approx(strength * (left - target), abs=1e-6)


def test_a_target_above_the_remaining_cost_closes_nothing() -> None:
    costs = {"f0_0": 1.0, "gone": 1.0}
    penalty = TargetPenalty(0.9).priced(lambda _: costs)
    assert isinstance(penalty, TargetPenalty)
    term = penalty.start()
    assert term(gates_at([HIGH]), 1.0).item() == pytest.approx(0, abs=1e-9)
    assert term.multipliers == pytest.approx((0, 0), abs=1e-9)


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ({"f0_0": 0.0}, "no feature costs anything"),
        ({"f0_0": 1.0, "stray": 1.0}, r"no gates: \['stray'\]"),
    ],
)
def test_costs_that_do_not_fit_the_gates_are_refused(costs: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TargetPenalty(0.5, costs=costs).start()(gates_at([0.0]), 1.0)


@pytest.mark.parametrize("cost", [-1.0, math.nan, math.inf])
def test_invalid_cost_is_refused(cost: float) -> None:
    with pytest.raises(ValueError, match=f"cost of feature 'a' is {cost}"):
        TargetPenalty(0.5, costs={"a": cost})


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.01, math.nan])
def test_target_share_outside_of_0_to_1_is_refused(keep: float) -> None:
    with pytest.raises(ValueError, match=rf"share of features to keep is {keep}; it must be in"):
        TargetPenalty(keep)


@pytest.mark.parametrize("learning_rate", [0.0, -1.0, math.nan])
def test_a_learning_rate_that_is_not_positive_is_refused(learning_rate: float) -> None:
    with pytest.raises(ValueError, match=f"learning rate is {learning_rate}; it must be positive"):
        TargetPenalty(0.5, learning_rate)
