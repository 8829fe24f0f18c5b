"""`Warmup`: learning rates that start small, for the dense and the fused optimizer."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchrec.distributed.model_parallel import DistributedModelParallel


class Warmup:
    """Raises the learning rates linearly over the first steps; a `train.Steps`.

    Step i, from 0, uses min(1, (i + 1) / (steps + 1)) of the full rate.

    Args:
        model: sharded model with its fused optimizer.
        optimizer: optimizer of all parameters that are not fused.
        steps: number of steps with less than the full rate.
    """

    def __init__(self, model: DistributedModelParallel, optimizer: Optimizer, steps: int) -> None:
        def share(step: int) -> float:
            return min(1.0, (step + 1) / (steps + 1))

        self._fused = model.fused_optimizer
        self._schedulers = [LambdaLR(part, share) for part in (optimizer, self._fused)]
        self._set_fused()

    def loss_term(self, step: int) -> Tensor | None:
        """Adds nothing to the loss."""
        return None

    def update(self, step: int) -> None:
        """Sets the rates of the next step."""
        for scheduler in self._schedulers:
            scheduler.step()
        self._set_fused()

    def _set_fused(self) -> None:
        # FBGEMM's kernels read their rate from the fused optimizer's groups when it steps.
        self._fused.step()
