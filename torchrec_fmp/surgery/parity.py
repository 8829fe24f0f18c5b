"""Compares the pruned model with the gated one on a real batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchrec.distributed.model_parallel import get_unwrapped_module

from torchrec_fmp.gates.attach import feature_gates
from torchrec_fmp.policies.selection import Selection
from torchrec_fmp.reshard.local_shards import sharded_collections


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
def gates_fixed(model: nn.Module, selection: Selection) -> Iterator[None]:
    """The gates have the selection's values; afterwards those that they had."""
    before = [(module, module.fixed) for _, module in feature_gates(model)]
    for module, _ in before:
        module.fix(selection.gates)
    try:
        yield
    finally:
        for module, fixed in before:
            module.fixed = fixed


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


def parity(
    old: nn.Module,
    new: nn.Module,
    selection: Selection,
    batch: Any,
    dense_features: Mapping[str, tuple[str, ...]],
) -> Difference:
    """Difference between the outputs of the gated and of the pruned model.

    Both are run in evaluation on this rank's batch, the gates at the selection's values; every
    floating point tensor of the outputs is compared. Collective, as the models' forward is.

    Args:
        old: the gated model.
        new: the pruned model.
        selection: what was pruned.
        batch: an input of the gated model; the pruned model gets its remaining dense columns.
        dense_features: fqn of a module that reads gated dense columns -> the columns' names.

    Raises:
        ValueError: if the models return different structures.
    """
    with evaluation(old), gates_fixed(old, selection):
        expected = _floats(old(batch))
    with evaluation(new), _narrowed_input(new, selection, dense_features):
        actual = _floats(new(batch))
    forget_input_order(new)
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (expected, actual)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the gated model returns {shapes[0]}, the pruned model {shapes[1]}")
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


def forget_input_order(model: nn.Module) -> None:
    """Lets the next batch decide anew in which order the collections find their features.

    A sharded collection keeps the order of the first batch's keys for good, so a batch that has
    the dropped features too, as parity's has, would misplace those of a batch that has not. The
    same attributes that TorchRec resets in `ShardedEmbeddingBagCollection.update_shards`.
    """
    for collection in sharded_collections(model).values():
        collection._has_uninitialized_input_dist = True
        collection._has_features_permute = True
        collection._input_dists = []
        collection._features_order = []
        collection._feature_splits = []


def _floats(output: Any) -> list[Tensor]:
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.is_floating_point()]


@contextmanager
def _narrowed_input(
    model: nn.Module, selection: Selection, dense_features: Mapping[str, tuple[str, ...]]
) -> Iterator[None]:
    """Modules that read fewer dense columns now are given those of the gated model's input."""
    bare = get_unwrapped_module(model)
    with ExitStack() as stack:
        for fqn, names in dense_features.items():
            dropped = set(selection.dropped)
            columns = [i for i, name in enumerate(names) if name not in dropped]

            def narrow(
                _: nn.Module, args: tuple[Any, ...], columns: list[int] = columns
            ) -> tuple[Any, ...]:
                return (args[0][:, columns], *args[1:])

            stack.callback(bare.get_submodule(fqn).register_forward_pre_hook(narrow).remove)
        yield
