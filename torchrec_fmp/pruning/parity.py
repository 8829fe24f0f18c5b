"""Parity: the pruned model computes what the old one computes, or it is not used."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_fmp.distributed.agreement import all_or_none, largest, watched
from torchrec_fmp.pruning.outputs import Forward, outputs_after, outputs_before
from torchrec_fmp.pruning.proposal import Proposal


class ParityError(RuntimeError):
    """The pruned model does not compute what the old model computes; nothing was changed."""


class Parity:
    """Compares the pruned model with the old one on a batch. Collective.

    Args:
        proposal: the prune; the old model's outputs are taken at once.
        batch: an input of the old model, on each rank its own.
        forward: runs a model on the batch.
        tolerance: largest difference allowed, relative to max(1, the largest output).

    Raises:
        ValueError: if the old model's output is not finite on any rank.
        RuntimeError: if the forward pass fails on another rank.
    """

    def __init__(self, proposal: Proposal, batch: Any, forward: Forward, tolerance: float) -> None:
        self._proposal = proposal
        self._batch = batch
        self._forward = forward
        self._tolerance = tolerance
        selection = proposal.manifest.selection
        self._expected = self._together(
            "the old model's forward",
            lambda: outputs_before(proposal.model, selection, batch, forward),
        )
        finite = all(bool(tensor.isfinite().all()) for tensor in self._expected)
        if largest(float(not finite), proposal.group, proposal.model.device):
            raise ValueError(
                "the old model's output is not finite on this batch, on this rank or another, so "
                "the pruned model could not be compared with it: nothing was changed"
            )

    def check(self, new: DistributedModelParallel) -> float:
        """Max abs difference over all ranks.

        Raises:
            ParityError: if the outputs differ by more than the tolerance on any rank.
            RuntimeError: if another rank fails.
        """
        proposal = self._proposal
        selection, dense_features = proposal.manifest.selection, proposal.blueprint.dense_features
        actual = self._together(
            "the new model's forward",
            lambda: outputs_after(new, selection, self._batch, self._forward, dense_features),
        )
        with all_or_none("comparing the models", proposal.group):
            difference = compare(self._expected, actual)
        device = proposal.model.device
        max_abs = largest(difference.max_abs, proposal.group, device)
        relative = largest(difference.relative, proposal.group, device)
        if not relative <= self._tolerance:
            raise ParityError(
                f"pruned and old outputs differ by {max_abs:.3g} ({relative:.3g} relative to the "
                f"largest), more than {self._tolerance:.3g}: a cut rule does not do what its "
                "module computes, or a gate was folded into a table of low precision, which needs "
                "a larger tolerance. Nothing was changed"
            )
        return max_abs

    def _together(self, what: str, outputs: Callable[[], list[Tensor]]) -> list[Tensor]:
        """A forward pass that ends on all ranks if it fails on one.

        The others wait for that rank in a collective, which only the group's timeout ends: it is
        left behind in its thread, and the group is of no use afterwards.
        """
        proposal = self._proposal
        if proposal.group.size() == 1:
            return outputs()

        def run(_: Callable[[], None]) -> list[Tensor]:
            if proposal.model.device.type == "cuda":
                torch.cuda.set_device(proposal.model.device)
            return outputs()

        with all_or_none(what, proposal.group) as check:
            return watched(run, check)


class Difference(NamedTuple):
    """How far two models' outputs lie apart.

    Args:
        max_abs: largest absolute difference; NaN where the old model's outputs are not finite,
            infinite where only the new one's are not.
        relative: the same over max(1, largest absolute output): what fp32 can be held to, whose
            rounding grows with the values.
    """

    max_abs: float
    relative: float


def compare(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> Difference:
    """Difference between the outputs of the old and of the pruned model on this rank.

    Raises:
        ValueError: if the models return different structures.
    """
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (expected, actual)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the old model returns {shapes[0]}, the pruned model {shapes[1]}")
    # Not an error here: the other ranks, whose outputs are finite, would wait for this one.
    if not all(bool(tensor.isfinite().all()) for tensor in expected):
        return Difference(math.nan, math.nan)
    max_abs = relative = torch.zeros((), dtype=torch.float64)
    for a, b in zip(expected, actual, strict=True):
        if a.numel() > 0:
            difference = (a.double() - b.double()).abs().max().cpu()
            difference = difference.nan_to_num(nan=math.inf, posinf=math.inf)
            scale = a.double().abs().max().clamp(min=1).cpu()
            max_abs = torch.maximum(max_abs, difference)
            relative = torch.maximum(relative, difference / scale)
    return Difference(float(max_abs), float(relative))
