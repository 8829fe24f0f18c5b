"""`FeatureGates`: one hard concrete gate for each feature of a collection or dense input."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchrec_fmp.gates.hard_concrete import HardConcrete


@dataclass(frozen=True)
class GateConfig:
    """Initial values, bounds and noise of gates.

    Args:
        initial_log_alpha: initial `log_alpha` of every gate; the default gate is open as often as
            closed.
        log_alpha_bounds: lower and upper bound of `log_alpha`. Above the upper bound, a gate would
            hardly feel the penalty; below the lower bound, it could not reopen.
        sampling: granularity of the noise. `example` draws one gate value per example and feature,
            `batch` one per feature. Both find the planted truth about equally often; `batch` is
            cheaper (docs/method.md, docs/benchmarks.md).
        centered: whether to judge a feature by how its embedding varies over the batch. A feature
            without signal is soon used as a constant in other features' dot products; the mean of
            its embedding then makes the exact gradient keep the gate open. Centering removes the
            mean from the gate's gradient, and from nothing else (docs/method.md).
        seed: seed of the noise, which depends only on (seed, step, rank, module).
        distribution: shape of the hard concrete distribution.

    Raises:
        ValueError: if the bounds exclude a fully closed gate, a fully open gate, or
            `initial_log_alpha`.
    """

    initial_log_alpha: float = 0.0
    log_alpha_bounds: tuple[float, float] = (-4.0, 2.5)
    sampling: Literal["batch", "example"] = "example"
    centered: bool = True
    seed: int = 0
    distribution: HardConcrete = field(default_factory=HardConcrete)

    def __post_init__(self) -> None:
        low, high = self.log_alpha_bounds
        closed, opened = self.distribution.closed_log_alpha, self.distribution.open_log_alpha
        if not (low <= closed and opened <= high):
            raise ValueError(
                f"log_alpha_bounds are {low} and {high}; they must reach from {closed:.3f}, where "
                f"a test-time gate is exactly 0, to {opened:.3f}, where it is exactly 1"
            )
        if not low <= self.initial_log_alpha <= high:
            raise ValueError(
                f"initial_log_alpha is {self.initial_log_alpha}; it must be within "
                f"log_alpha_bounds, {low} to {high}"
            )


class FeatureGates(nn.Module):
    """Gates for a list of features.

    All gates of the module are in one of three states:

    - *open* (`set_open(True)`): every gate is exactly 1 and `log_alpha` gets a zero gradient;
    - *fixed* (`fix(values)`): a selection has been decided, and the gates have its values;
    - otherwise, sampled in training and deterministic in evaluation.

    Args:
        features: feature names; each gets one gate.
        config: initial values, bounds and noise.
        name: name that distinguishes the noise of several modules, such as the module's fqn.
        device: device of `log_alpha`, CPU by default.
    """

    def __init__(
        self,
        features: Sequence[str],
        config: GateConfig,
        name: str,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        # CPU even under `with torch.device("meta")`: sharding copies the gates to their device.
        device = device or torch.device("cpu")
        self.features = tuple(features)
        self.config = config
        self.name = name
        self.is_open = False
        self.log_alpha = nn.Parameter(
            torch.empty(len(self.features), dtype=torch.float32, device=device)
        )
        self.register_buffer("fixed", None, persistent=False)
        self.fixed: Tensor | None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Resets every gate to the config's initial value."""
        nn.init.constant_(self.log_alpha, self.config.initial_log_alpha)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Clamps `log_alpha` to its bounds; `gate_optimizer` does this after every step."""
        self.log_alpha.clamp_(*self.config.log_alpha_bounds)

    def set_open(self, is_open: bool) -> None:
        """Sets all gates to exactly 1, or returns them to the distribution."""
        self.is_open = is_open

    def fix(self, values: Mapping[str, float] | None) -> None:
        """Fixes the gates at a selection's values; None releases them.

        Raises:
            KeyError: if a feature of the module has no value.
        """
        self.fixed = (
            None
            if values is None
            else torch.tensor(
                [values[feature] for feature in self.features],
                dtype=torch.float32,
                device=self.log_alpha.device,
            )
        )

    # Noise needs the host, so a compiled module that holds gates runs them between two graphs.
    @torch.compiler.disable
    def forward(self, step: int, batch_size: int) -> Tensor:
        """Computes the gate values.

        Args:
            step: number of the training step, which keys the noise; see `StepCounter`.
            batch_size: number of examples on this rank.

        Returns:
            (F,) fp32, or (B, F) fp32 if the sampling is per example.
        """
        # Zero times log_alpha keeps the parameter in the graph, which DistributedDataParallel's
        # static graph needs in every step or in none.
        if self.fixed is not None:
            return self.fixed + 0 * self.log_alpha
        if self.is_open:
            return 1 + 0 * self.log_alpha
        if not self.training:
            return self.config.distribution.deterministic(self.log_alpha)
        shape: tuple[int, ...] = (len(self.features),)
        if self.config.sampling == "example":
            shape = (batch_size, *shape)
        uniform = torch.rand(shape, generator=self._generator(step), device=self.log_alpha.device)
        return self.config.distribution.sample(self.log_alpha, uniform)

    @torch.no_grad()
    def values(self) -> Tensor:
        """The gates that evaluation uses, (F,) fp32."""
        if self.fixed is not None:
            return self.fixed
        if self.is_open:
            return torch.ones_like(self.log_alpha)
        return self.config.distribution.deterministic(self.log_alpha)

    def open_probability(self) -> Tensor:
        """P(z > 0) of each gate, (F,) fp32, differentiable in `log_alpha`."""
        return self.config.distribution.open_probability(self.log_alpha)

    def _generator(self, step: int) -> torch.Generator:
        """A generator that depends only on (seed, step, rank, module), not on earlier draws.

        Ranks draw different noise. The noise averages out sooner, because log_alpha's gradient is
        all-reduced.
        """
        rank = dist.get_rank() if dist.is_initialized() else 0
        key = struct.pack("<qqq", self.config.seed, step, rank) + self.name.encode()
        digest = hashlib.blake2b(key, digest_size=8).digest()
        generator = torch.Generator(device=self.log_alpha.device)
        return generator.manual_seed(int.from_bytes(digest, "little") >> 1)

    def extra_repr(self) -> str:
        return f"{len(self.features)} features, sampling={self.config.sampling}"
