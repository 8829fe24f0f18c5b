"""Parameters on the meta device that keep what `apply_optimizer_in_backward` set on them.

Deep copies of a parameter do not: torch copies its values and `requires_grad` alone.
"""

from __future__ import annotations

import torch
from torch import nn

from torchrec_fmp.embeddings.seams import copy_fused_optimizer


def meta_parameter(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter like this one, without values."""
    meta = nn.Parameter(
        torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad
    )
    copy_fused_optimizer(parameter, meta)
    return meta
