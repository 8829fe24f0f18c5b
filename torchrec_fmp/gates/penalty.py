"""Penalties that close gates: a price for every open gate, or a target for how many stay open."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from torchrec_fmp.gates.feature_gates import FeatureGates
from torchrec_fmp.selection.costs import BudgetUnit


class PenaltyTerm(abc.ABC):
    """A penalty in training: a term of the loss, and the state that it has learned so far."""

    @abc.abstractmethod
    def __call__(self, gates: Sequence[FeatureGates], strength: float) -> Tensor:
        """The term for the next step, a scalar in the loss's unit.

        Args:
            gates: all gates of the model.
            strength: fraction of the full penalty: from 0 to 1 during the ramp, then 1.
        """

    def state_dict(self) -> dict[str, float]:
        """The state that the term has learned: plain numbers, equal on every rank."""
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restores the output of `state_dict`.

        Raises:
            ValueError: if the state is from another penalty.
        """
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, but got {sorted(state)}")


class Penalty(abc.ABC):
    """Configuration of the force that closes gates; training does not change it."""

    @abc.abstractmethod
    def start(self) -> PenaltyTerm:
        """The penalty's term of the loss, in its state before the first step."""

    def priced(
        self,
        costs: Callable[[BudgetUnit], Mapping[str, float]],
        share: Callable[[float], float] = float,
    ) -> Penalty:
        """The penalty for one prune, with the model's costs.

        Args:
            costs: function from a unit to feature -> cost, for all features of the full model,
                including features that earlier prunes dropped; in `features`, each costs 1.
            share: function from the share of all features that the last prune keeps to the share
                that this prune keeps.
        """
        return self


class L0Penalty(Penalty, PenaltyTerm):
    """The expected L0 norm: `weight` times the sum over features of P(z > 0).

    It learns nothing, so it is its own `PenaltyTerm`.

    Args:
        weight: price of one feature in the loss's unit, nats of logloss: roughly, a feature stays
            if it lowers the logloss by more than this.

    Raises:
        ValueError: if the weight is negative or not finite.
    """

    def __init__(self, weight: float = 3e-4) -> None:
        if not (weight >= 0 and math.isfinite(weight)):
            raise ValueError(f"the penalty's weight is {weight}; it must be finite and at least 0")
        self.weight = weight

    def start(self) -> PenaltyTerm:
        return self

    def __call__(self, gates: Sequence[FeatureGates], strength: float) -> Tensor:
        return self.weight * strength * _open_probability(gates).sum()


class TargetPenalty(Penalty):
    """Drives the open gates' expected share s of the cost to a target t: an augmented Lagrangian.

        lambda_1 (s - t) + lambda_2 (s - t)^2

    The multipliers ascend, and t falls from 1 as the strength rises, as in FLOP (arXiv:1910.04732,
    section 3) and LLM-Shearing. Gates are measured between their bounds, so that s = t when exactly
    the target share of the gates is at the upper bound and the rest at the lower bound.

    With several prunes, `priced` makes one penalty per prune, whose target is the share of all
    features that the schedule keeps. Dropped features count as closed, so that t falls from the
    share of the remaining features.

    The unit of the costs is a choice. If all features cost the same, useful narrow features are
    given up for wide ones. In bytes or milliseconds, wide features are given up for many narrow
    ones, and nothing closes free features, such as dense columns.

    Args:
        keep: share of the cost of all features to keep, in (0, 1].
        learning_rate: learning rate of the multipliers' gradient ascent, per step.
        unit: unit of the costs: `features`, where each feature costs 1, or a unit of
            `torchrec_fmp.costs`.
        costs: feature -> cost of keeping it, in any unit; features without a cost are free. By
            default, a run prices its model in `unit`, before its first prune.

    Raises:
        ValueError: if `keep` is not in (0, 1], the learning rate is not positive, or a cost is
            negative or not finite.
    """

    def __init__(
        self,
        keep: float,
        learning_rate: float = 3e-3,
        unit: BudgetUnit = "features",
        costs: Mapping[str, float] | None = None,
    ) -> None:
        if not 0 < keep <= 1:
            raise ValueError(f"the share of features to keep is {keep}; it must be in (0, 1]")
        if not learning_rate > 0:
            raise ValueError(
                f"the multipliers' learning rate is {learning_rate}; it must be positive"
            )
        for feature, cost in (costs or {}).items():
            if not (cost >= 0 and math.isfinite(cost)):
                raise ValueError(
                    f"the cost of feature {feature!r} is {cost}; it must be finite and at least 0"
                )
        self.keep = keep
        self.learning_rate = learning_rate
        self.unit = unit
        self.costs = costs
        # These may have a cost but no gate, because an earlier prune dropped them.
        self._all: frozenset[str] = frozenset()

    def priced(
        self,
        costs: Callable[[BudgetUnit], Mapping[str, float]],
        share: Callable[[float], float] = float,
    ) -> Penalty:
        own = costs(self.unit) if self.costs is None else self.costs
        penalty = TargetPenalty(share(self.keep), self.learning_rate, self.unit, own)
        penalty._all = frozenset(costs("features"))
        return penalty

    def start(self) -> TargetTerm:
        return TargetTerm(self)

    def shares(self, gates: Sequence[FeatureGates]) -> list[float]:
        """Each feature's share of the total cost.

        Raises:
            ValueError: if the costs are missing, include a feature without a gate, or are all 0.
        """
        features = [feature for module in gates for feature in module.features]
        if self.costs is None and self.unit == "features":
            return [1 / len(features)] * len(features)
        if self.costs is None:
            raise ValueError(
                f"TargetPenalty needs costs in {self.unit}: use "
                f"TargetPenalty(..., costs=costs(model, topology, {self.unit!r}))"
            )
        unknown = sorted(self.costs.keys() - set(features) - self._all)
        if unknown:
            raise ValueError(f"the costs include features that have no gates: {unknown}")
        total = math.fsum(self.costs.values())
        if total == 0:
            raise ValueError(
                "no feature costs anything, so dropping features cannot meet a budget: give at "
                "least one feature a positive cost"
            )
        return [self.costs.get(feature, 0.0) / total for feature in features]


class TargetTerm(PenaltyTerm):
    """The term of a `TargetPenalty`; its multipliers ascend with every step."""

    def __init__(self, penalty: TargetPenalty) -> None:
        self._penalty = penalty
        self.multipliers = (0.0, 0.0)

    def __call__(self, gates: Sequence[FeatureGates], strength: float) -> Tensor:
        shares = self._penalty.shares(gates)
        left = math.fsum(shares)
        target = left + strength * min(0.0, self._penalty.keep - left)
        excess = _open_share(gates, shares) - target
        linear, quadratic = self.multipliers
        if strength > 0:
            value = float(excess.detach())
            linear += self._penalty.learning_rate * value
            quadratic += self._penalty.learning_rate * value**2
            self.multipliers = (linear, quadratic)
        return linear * excess + quadratic * excess**2

    def state_dict(self) -> dict[str, float]:
        linear, quadratic = self.multipliers
        return {"linear": linear, "quadratic": quadratic}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        if state.keys() != self.state_dict().keys():
            raise ValueError(
                f"the multipliers must be linear and quadratic, but got {sorted(state)}"
            )
        self.multipliers = (state["linear"], state["quadratic"])


def _open_share(gates: Sequence[FeatureGates], shares: Sequence[float]) -> Tensor:
    """The sum of P(z > 0), weighted by share of the cost, shifted and scaled.

    It is 0 with all gates at their lower bounds, and the sum of the shares at the upper bounds.
    """
    config = gates[0].config
    bounds = torch.tensor(config.log_alpha_bounds)
    low, high = config.distribution.open_probability(bounds).tolist()
    probability = _open_probability(gates)
    weight = torch.tensor(shares, device=probability.device)
    return (weight * (probability - low)).sum() / (high - low)


def _open_probability(gates: Sequence[FeatureGates]) -> Tensor:
    return torch.cat([module.open_probability() for module in gates])
