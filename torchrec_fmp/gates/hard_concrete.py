"""The hard concrete distribution of Louizos, Welling and Kingma 2018 (arXiv:1712.01312).

    s = sigmoid((log u - log(1 - u) + log_alpha) / temperature),  u ~ Uniform(0, 1)
    z = clamp(s * (zeta - gamma) + gamma, 0, 1)

All functions are elementwise in `log_alpha`, differentiable, and compute in fp32: in bf16 the
largest u below 1 rounds to 1 and its logit is infinite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# u is kept this far from 0 and 1, as in the authors' code, so that its logit is finite.
_UNIFORM_MARGIN = 1e-6


@dataclass(frozen=True)
class HardConcrete:
    """Shape of the distribution; the defaults are the paper's.

    Args:
        temperature: beta in the paper; towards 0, the gate becomes a Bernoulli variable.
        gamma: lower end of the stretched interval, below 0.
        zeta: upper end of the stretched interval, above 1.

    Raises:
        ValueError: if the interval does not contain [0, 1] in its interior.
    """

    temperature: float = 2 / 3
    gamma: float = -0.1
    zeta: float = 1.1

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature is {self.temperature}; it must be positive and finite")
        if not (-math.inf < self.gamma < 0 and 1 < self.zeta < math.inf):
            raise ValueError(
                f"gamma is {self.gamma} and zeta is {self.zeta}; "
                "they must satisfy gamma < 0 and zeta > 1, or the gate never reaches 0 and 1"
            )

    @property
    def closed_log_alpha(self) -> float:
        """The largest `log_alpha` whose test-time gate is exactly 0; -2.398 for the defaults."""
        return math.log(-self.gamma / self.zeta)

    @property
    def open_log_alpha(self) -> float:
        """The smallest `log_alpha` whose test-time gate is exactly 1; 2.398 for the defaults."""
        return math.log((1 - self.gamma) / (self.zeta - 1))

    def sample(self, log_alpha: Tensor, uniform: Tensor) -> Tensor:
        """Gate values for given noise (eq. 10 and 11 of the paper).

        Args:
            log_alpha: parameters of the gates, (F,) fp32.
            uniform: noise, (..., F) fp32 in [0, 1].

        Returns:
            (..., F) fp32 in [0, 1]; exactly 0 or 1 with positive probability.
        """
        u = uniform.float().clamp(_UNIFORM_MARGIN, 1 - _UNIFORM_MARGIN)
        return self._stretch((torch.logit(u) + log_alpha.float()) / self.temperature)

    def deterministic(self, log_alpha: Tensor) -> Tensor:
        """The test-time gate (eq. 13 of the paper): no noise and no temperature."""
        return self._stretch(log_alpha.float())

    def open_probability(self, log_alpha: Tensor) -> Tensor:
        """P(z > 0) (eq. 12 of the paper), whose sum is the expected L0 norm."""
        shift = self.temperature * math.log(-self.gamma / self.zeta)
        return torch.sigmoid(log_alpha.float() - shift)

    def _stretch(self, logits: Tensor) -> Tensor:
        return (torch.sigmoid(logits) * (self.zeta - self.gamma) + self.gamma).clamp(0, 1)
