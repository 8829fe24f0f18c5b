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
    """How gates start and how their noise is drawn.

    Args:
        initial_log_alpha: where every gate starts; the default is as often open as closed.
        log_alpha_bounds: `log_alpha` stays between the two. A gate beyond the upper one hardly
            feels the penalty any more, and one below the lower could not come back.
        sampling: `example` draws one gate value for each example and feature, `batch` one for each
            feature. Both find the planted truth about equally often; per batch is cheaper
            (docs/method.md, docs/benchmarks.md).
        centered: judge a feature by how its embedding varies over the batch. A feature without
            signal is soon used as a constant that other features' dot products are read with;
            its embedding's mean then makes the exact gradient keep the gate open. Centering leaves
            the mean out of the gate's gradient, and of nothing else (docs/method.md).
        seed: of the noise, which is a function of (seed, step, rank, module) alone.
        distribution: the hard concrete's shape.

    Raises:
        ValueError: if a closed or an open gate lies outside the bounds, or the start does.
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
                f"initial_log_alpha is {self.initial_log_alpha}, outside of {low} to {high}"
            )


class FeatureGates(nn.Module):
    """Gates of a list of features.

    A gate is in one of three states, the same for all gates of the module:

    - *open* (`set_open(True)`): every gate is exactly 1 and `log_alpha` gets a zero gradient;
    - *fixed* (`fix(values)`): a selection has been decided, gates have its values;
    - otherwise sampled in training and deterministic in evaluation.

    Args:
        features: names, one gate each.
        config: start and noise.
        name: distinguishes the noise of several modules; the module's fqn serves.
        device: of `log_alpha`, CPU by default.
    """

    def __init__(
        self,
        features: Sequence[str],
        config: GateConfig,
        name: str,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        # Even within `with torch.device("meta")`: sharding copies the gates to their device.
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
        """Puts every gate where the config starts it."""
        nn.init.constant_(self.log_alpha, self.config.initial_log_alpha)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Brings `log_alpha` back into its bounds; `gate_optimizer` does it after every step."""
        self.log_alpha.clamp_(*self.config.log_alpha_bounds)

    def set_open(self, is_open: bool) -> None:
        """Opens all gates exactly, or gives them back to the distribution."""
        self.is_open = is_open

    def fix(self, values: Mapping[str, float] | None) -> None:
        """Fixes the gates at a selection's values; None frees them.

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

    # Noise needs the host: a compiled module that holds gates runs them between two graphs.
    @torch.compiler.disable
    def forward(self, step: int, batch_size: int) -> Tensor:
        """Gate values.

        Args:
            step: number of the training step, the noise's key; see `StepCounter`.
            batch_size: number of examples on this rank.

        Returns:
            (F,) fp32, or (B, F) fp32 where the sampling is per example.
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
        """A generator that depends on (seed, step, rank, module) and on nothing before it.

        Ranks draw different noise: it averages out sooner, and log_alpha's gradient is all-reduced.
        """
        rank = dist.get_rank() if dist.is_initialized() else 0
        key = struct.pack("<qqq", self.config.seed, step, rank) + self.name.encode()
        digest = hashlib.blake2b(key, digest_size=8).digest()
        generator = torch.Generator(device=self.log_alpha.device)
        return generator.manual_seed(int.from_bytes(digest, "little") >> 1)

    def extra_repr(self) -> str:
        return f"{len(self.features)} features, sampling={self.config.sampling}"
