"""Parameters on the meta device that keep what `apply_optimizer_in_backward` set on them.

Deep copies of a parameter do not: torch copies its values and `requires_grad` alone.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def meta_parameter(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter like this one, without values."""
    meta = nn.Parameter(
        torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad
    )
    copy_fused_optimizer(parameter, meta)
    return meta


def copy_fused_optimizer(source: Tensor, target: Tensor) -> None:
    """Carries over what `apply_optimizer_in_backward` set on a parameter."""
    for attribute in ("_optimizer_classes", "_optimizer_kwargs"):
        if hasattr(source, attribute):
            setattr(target, attribute, copy.deepcopy(getattr(source, attribute)))
