"""What drives gates to close: a price for every open gate, or a target for how many stay open."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchrec_fmp.gates.feature_gates import FeatureGates


class Penalty(abc.ABC):
    """A term of the loss that depends on the gates alone."""

    @abc.abstractmethod
    def __call__(self, gates: Sequence[FeatureGates], strength: float) -> Tensor:
        """The term for the coming step, a scalar in the loss's unit.

        Args:
            gates: all gates of the model.
            strength: from 0 to 1 while the penalty is ramped up, then 1.
        """


class L0Penalty(Penalty):
    """The expected L0 norm: `weight` times the sum over features of P(z > 0).

    Args:
        weight: price of one feature in the loss's unit, nats of logloss: roughly, a feature stays
            if it lowers the logloss by more than this.

    Raises:
        ValueError: if the weight is negative or not finite.
    """

    def __init__(self, weight: float = 1e-3) -> None:
        if not (weight >= 0 and math.isfinite(weight)):
            raise ValueError(f"the penalty's weight is {weight}, it must be finite and at least 0")
        self.weight = weight

    def __call__(self, gates: Sequence[FeatureGates], strength: float) -> Tensor:
        return self.weight * strength * _open_probability(gates).sum()


class TargetPenalty(Penalty):
    """Drives the expected share s of open gates to a target t with an augmented Lagrangian.

        lambda_1 (s - t) + lambda_2 (s - t)^2

    The multipliers ascend and t falls from 1 with the strength, as in FLOP (arXiv:1910.04732,
    section 3) and LLM-Shearing. Gates are counted between their bounds, so that s = t when exactly
    the target's share of the gates is at the upper bound and the rest at the lower.

    Args:
        keep: share of the features to keep, in (0, 1].
        learning_rate: of the multipliers' gradient ascent, a step.

    Raises:
        ValueError: if `keep` is not in (0, 1] or the learning rate is not positive.
    """

    def __init__(self, keep: float, learning_rate: float = 3e-3) -> None:
        if not 0 < keep <= 1:
            raise ValueError(f"the share of features to keep is {keep}, it must be in (0, 1]")
        if not learning_rate > 0:
            raise ValueError(f"the multipliers' learning rate is {learning_rate}, not positive")
        self.keep = keep
        self.learning_rate = learning_rate
        self.multipliers = (0.0, 0.0)

    def __call__(self, gates: Sequence[FeatureGates], strength: float) -> Tensor:
        excess = _open_share(gates) - (1 + strength * (self.keep - 1))
        linear, quadratic = self.multipliers
        if strength > 0:
            value = float(excess.detach())
            linear += self.learning_rate * value
            quadratic += self.learning_rate * value**2
            self.multipliers = (linear, quadratic)
        return linear * excess + quadratic * excess**2


def _open_probability(gates: Sequence[FeatureGates]) -> Tensor:
    return torch.cat([module.open_probability() for module in gates])


def _open_share(gates: Sequence[FeatureGates]) -> Tensor:
    """Mean P(z > 0), shifted and scaled to be 0 at the lower bounds and 1 at the upper."""
    config = gates[0].config
    low, high = config.distribution.open_probability(torch.tensor(config.log_alpha_bounds)).tolist()
    return (_open_probability(gates).mean() - low) / (high - low)
