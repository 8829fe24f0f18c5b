"""The form of a dense optimizer's state of a parameter, which all ranks can know."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchrec_fmp.reshard.dense_optimizer import ParamGroup

# Rows and columns of a sample parameter, which shows an optimizer's states.
_SAMPLE = (2, 3)


@dataclass(frozen=True)
class DenseState:
    """The form of an optimizer's state of a table, without the values that belong to rows.

    Args:
        by_rows: name -> empty tensor, (0, columns), (0, 1) or (0,), on the CPU.
        others: name -> step counters and other values of the whole table, on the CPU.
        on_device: names in `others` whose values lie on the weight's device, if it is not the CPU.
        odd: names of tensors that do not belong to rows.
    """

    by_rows: Mapping[str, Tensor]
    others: Mapping[str, Any]
    on_device: frozenset[str] = frozenset()
    odd: tuple[str, ...] = ()

    @staticmethod
    def of(shape: torch.Size, state: Mapping[str, Any]) -> DenseState:
        """The form of a state, for a parameter of the given shape."""
        by_rows: dict[str, Tensor] = {}
        others: dict[str, Any] = {}
        odd = []
        for name, value in state.items():
            if not isinstance(value, Tensor):
                others[name] = value
            elif value.dim() == 0:
                others[name] = value.cpu()
            elif value.shape in (shape, (shape[0], 1), (shape[0],)):
                by_rows[name] = torch.empty(0, *value.shape[1:], dtype=value.dtype)
            else:
                odd.append(name)
        on_device = [name for name in others if getattr(state[name], "is_cuda", False)]
        return DenseState(by_rows, others, frozenset(on_device), tuple(odd))

    @property
    def names(self) -> set[str]:
        """Names of all states except the step and states that are None."""
        others = {name for name, value in self.others.items() if value is not None}
        return {*self.by_rows, *others, *self.odd} - {"step"}

    @property
    def step(self) -> int:
        """Step of the optimizer; 0 if the optimizer does not count steps."""
        return int(self.others.get("step", 0))

    @property
    def layout(self) -> dict[str, tuple[torch.dtype, bool]]:
        """The states in the form of `Layout.states`."""
        return {
            name: (empty.dtype, empty.shape[1:].numel() == 1)
            for name, empty in sorted(self.by_rows.items())
        }

    def at(self, step: int) -> DenseState:
        """The same form with another step, if the optimizer counts steps."""
        if "step" not in self.others:
            return self
        kept = self.others["step"]
        now = torch.full_like(kept, step) if isinstance(kept, Tensor) else type(kept)(step)
        return DenseState(self.by_rows, {**self.others, "step": now}, self.on_device, self.odd)

    def zeros(self, parameter: Tensor) -> dict[str, Any]:
        """The state of a parameter (rows, columns); values that belong to rows are zero."""
        width = parameter.shape[1]
        state: dict[str, Any] = {
            name: torch.zeros(
                len(parameter),
                *(1 if size == 1 else width for size in empty.shape[1:]),
                dtype=empty.dtype,
                device=parameter.device,
            )
            for name, empty in self.by_rows.items()
        }
        for name, value in self.others.items():
            state[name] = value.clone() if isinstance(value, Tensor) else value
            if name in self.on_device:
                state[name] = state[name].to(parameter.device)
        return state


def sample_state(
    fqn: str, held_in: ParamGroup, dtype: torch.dtype, device: torch.device
) -> DenseState:
    """The state that an optimizer keeps in a param group, found by a trial with a small parameter.

    Raises:
        ValueError: if the optimizer cannot be created from its group's settings.
    """
    kind = type(held_in.optimizer)
    parameter = nn.Parameter(torch.zeros(_SAMPLE, dtype=dtype, device=device))
    parameter.grad = torch.zeros_like(parameter)
    accepted = inspect.signature(kind).parameters.keys() - {"params"}
    settings = {name: value for name, value in held_in.group.items() if name in accepted}
    try:
        optimizer = kind([parameter], **settings)
        optimizer.step()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{fqn} cannot move between the dense and the fused optimizer: a trial of "
            f"{kind.__name__} to find its states failed ({error}). Pass a plan that leaves the "
            "table where it is"
        ) from error
    return DenseState.of(parameter.shape, optimizer.state[parameter])
