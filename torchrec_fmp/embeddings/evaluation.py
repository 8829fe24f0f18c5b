"""Evaluation that leaves a sharded model unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from torchrec_fmp.embeddings.local_shards import is_fused, sharded_collections
from torchrec_fmp.embeddings.seams import kernels, step_counters


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def steps_uncounted(model: nn.Module) -> Iterator[None]:
    """Leaves the fused optimizers' step counters unchanged.

    FBGEMM counts a step in every forward pass, in evaluation too (`iter` for checkpoints,
    `iter_cpu` for its arithmetic), which would affect Adam's bias correction.
    """
    counters = [
        (counter, counter.clone())
        for collection in sharded_collections(model).values()
        for kernel in kernels(collection)
        if is_fused(kernel)
        for counter in step_counters(kernel)
    ]
    try:
        yield
    finally:
        for counter, before in counters:
            counter.copy_(before)
