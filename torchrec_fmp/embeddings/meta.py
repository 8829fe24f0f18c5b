"""Parameters on the meta device that keep their `apply_optimizer_in_backward` attributes.

A deep copy of a parameter loses them: torch copies only its values and `requires_grad`.
"""

from __future__ import annotations

import torch
from torch import nn

from torchrec_fmp.embeddings.seams import copy_fused_optimizer


def meta_parameter(parameter: nn.Parameter) -> nn.Parameter:
    """A copy of the parameter on the meta device, without values."""
    meta = nn.Parameter(
        torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad
    )
    copy_fused_optimizer(parameter, meta)
    return meta
