"""`StepCounter`: the training step of a gated module, which keys its gates' noise."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StepCounter(nn.Module):
    """Counts the training forwards of the module that it belongs to.

    The count lives on the host, so that drawing noise never waits for a device. It is in the state
    dict, as an int64 scalar on CPU, so that a resumed job continues with the noise that it would
    have drawn. It is not a buffer: DistributedDataParallel and `.to(device)` would move it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.value = 0

    # Otherwise a compiled module that holds a counter would be compiled again for every count.
    @torch.compiler.disable
    def next(self) -> int:
        """The step of the next forward; counts up in training."""
        step = self.value
        if self.training:
            self.value += 1
        return step

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.value, dtype=torch.int64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.value = int(state)

    def extra_repr(self) -> str:
        return str(self.value)
