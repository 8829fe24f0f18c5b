"""Parity: the pruned model is used only if it computes what the old model computes."""

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
    """The pruned model's outputs do not match the old model's outputs; nothing was changed."""


class Parity:
    """Compares the pruned model with the old one on a batch. Collective.

    Args:
        proposal: prune to check; the old model's outputs are computed immediately.
        batch: input of the old model, different on each rank.
        forward: function that runs a model on the batch.
        tolerance: largest allowed difference, relative to max(1, the largest output).

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
                "the pruned model cannot be compared with it: use another batch. Nothing was "
                "changed"
            )

    def check(self, new: DistributedModelParallel) -> float:
        """Largest absolute difference over all ranks.

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
                f"largest), more than {self._tolerance:.3g}: a cut rule does not match its "
                "module's forward, or a gate was folded into a low-precision table, which needs a "
                "larger tolerance. Nothing was changed"
            )
        return max_abs

    def _together(self, what: str, outputs: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Runs a forward pass that fails on all ranks if it fails on one.

        The other ranks wait for the failed rank in a collective that only the group's timeout ends.
        The collective is left behind in its thread, and the group is unusable afterwards.
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
    """The difference between the outputs of two models.

    Args:
        max_abs: largest absolute difference; NaN if the old model's outputs are not finite,
            infinite if only the new model's are not.
        relative: largest ratio, over the output tensors, of the difference to max(1, largest
            absolute output), because fp32 rounding grows with the values.
    """

    max_abs: float
    relative: float


def compare(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> Difference:
    """The difference between the outputs of the old and the pruned model on this rank.

    Raises:
        ValueError: if the models return different structures.
    """
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (expected, actual)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the old model returns shapes {shapes[0]}, but the pruned model {shapes[1]}"
        )
    # An error here would leave the other ranks, whose outputs are finite, waiting for this one.
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
