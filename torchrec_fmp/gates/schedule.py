"""`GateSchedule`: the gates over the steps of pretraining."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from torchrec_fmp.gates.feature_gates import FeatureGates
from torchrec_fmp.gates.penalty import Penalty


class GateSchedule:
    """The gates over the steps of pretraining: open, then a growing penalty, then the full one.

    While the gates are open, the model learns as if there were none. Features whose signal shows
    late, because they matter only together, are therefore not closed before it does.

    Args:
        gates: gates of the model.
        optimizer: optimizer of the gates.
        penalty: penalty that drives the gates to close.
        steps: number of pretraining steps.
        open_steps: number of steps, at the start, in which every gate is exactly open.
        ramp_steps: number of steps, after the open ones, in which the penalty grows linearly to its
            full strength.
    """

    def __init__(
        self,
        gates: list[FeatureGates],
        optimizer: Optimizer,
        penalty: Penalty,
        steps: int,
        open_steps: int,
        ramp_steps: int,
    ) -> None:
        if not (0 <= open_steps and 0 <= ramp_steps and open_steps + ramp_steps < steps):
            raise ValueError(
                f"{open_steps} open steps and {ramp_steps} ramp steps leave none of {steps} "
                "pretraining steps for the full penalty: pretrain on more rows, or in "
                "smaller batches"
            )
        self._gates = gates
        self._optimizer = optimizer
        self._penalty = penalty.start()
        self._open_steps = open_steps
        self._ramp_steps = ramp_steps

    def loss_term(self, step: int) -> Tensor:
        """Sets the gates' state for the step, and returns the term to add to the loss."""
        is_open = step < self._open_steps
        for module in self._gates:
            module.set_open(is_open)
        past = step - self._open_steps
        strength = 0.0 if is_open else min(1.0, (past + 1) / (self._ramp_steps + 1))
        return self._penalty(self._gates, strength)

    def update(self, step: int) -> None:
        """Steps the gates' optimizer, except while the gates are open."""
        if step >= self._open_steps:
            self._optimizer.step()
        self._optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The state that the penalty has learned, without the gates and their optimizer."""
        return {"penalty": self._penalty.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the output of `state_dict`.

        Raises:
            ValueError: if the state is from another penalty.
        """
        self._penalty.load_state_dict(state["penalty"])
