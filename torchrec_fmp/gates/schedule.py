"""`GateSchedule`: gates over the steps of pretraining."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from torchrec_fmp.gates.feature_gates import FeatureGates
from torchrec_fmp.gates.penalty import Penalty


class GateSchedule:
    """Gates over the steps of pretraining: open at first, then penalized ever more, then fully.

    While the gates are open the model learns as if there were none, so that features whose signal
    shows late (those that matter only together) are not closed before it does.

    Args:
        gates: of the model.
        optimizer: of the gates.
        penalty: what drives them to close.
        steps: of pretraining.
        open_steps: with every gate exactly open.
        ramp_steps: after these, in which the penalty grows linearly to its full strength.
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
                "pretraining steps for the full penalty: pretrain on more rows, or smaller batches"
            )
        self._gates = gates
        self._optimizer = optimizer
        self._penalty = penalty.start()
        self._open_steps = open_steps
        self._ramp_steps = ramp_steps

    def loss_term(self, step: int) -> Tensor:
        """Puts the gates into their state for the step; what to add to the loss."""
        is_open = step < self._open_steps
        for module in self._gates:
            module.set_open(is_open)
        past = step - self._open_steps
        strength = 0.0 if is_open else min(1.0, (past + 1) / (self._ramp_steps + 1))
        return self._penalty(self._gates, strength)

    def update(self, step: int) -> None:
        """Steps the gates' optimizer, which rests while they are open."""
        if step >= self._open_steps:
            self._optimizer.step()
        self._optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """What the penalty has learned; gates and their optimizer have states of their own."""
        return {"penalty": self._penalty.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what `state_dict` gave.

        Raises:
            ValueError: if it is of another penalty.
        """
        self._penalty.load_state_dict(state["penalty"])
