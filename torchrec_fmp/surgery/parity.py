"""Compares the pruned model with the old one on a real batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import get_unwrapped_module
from torchrec.distributed.types import LazyAwaitable

from torchrec_fmp.gates.attach import feature_gates
from torchrec_fmp.gates.collections import feature_names
from torchrec_fmp.gates.scale import scale_keys, scale_sequences
from torchrec_fmp.policies.selection import Selection
from torchrec_fmp.reshard.local_shards import (
    ShardedCollection,
    kernels,
    sharded_collections,
    tables_of,
)

Forward = Callable[[nn.Module, Any], Any]


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


@contextmanager
def steps_uncounted(model: nn.Module) -> Iterator[None]:
    """The fused optimizers' step counters keep their values.

    FBGEMM counts a step in every forward pass, in evaluation too (`iter` for checkpoints,
    `iter_cpu` for its arithmetic), and Adam's bias correction would feel it.
    """
    counters = [
        (counter, counter.clone())
        for collection in sharded_collections(model).values()
        for kernel in kernels(collection)
        for name in ("iter", "iter_cpu")
        if (counter := getattr(kernel.emb_module, name, None)) is not None
    ]
    try:
        yield
    finally:
        for counter, before in counters:
            counter.copy_(before)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation that leaves no trace, without the graphs that `torch.compile` made.

    They would not see the hooks of a comparison.
    """
    with evaluation(model), torch.compiler.set_stance("force_eager"), steps_uncounted(model):
        yield


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


def outputs_before(
    model: nn.Module, selection: Selection, batch: Any, forward: Forward
) -> list[Tensor]:
    """What the old model computes in evaluation with its features scaled as the selection says.

    Gates get the selection's values; where a collection has none, its embeddings are multiplied by
    them. Collective, as the model's forward is.

    Args:
        model: the old model, sharded.
        selection: what is to be pruned.
        batch: an input of the model.
        forward: runs a model on the batch.

    Returns:
        Every floating point tensor of the output.
    """
    with (
        _undisturbed(model),
        gates_fixed(model, selection),
        _scaled(model, selection),
    ):
        return _floats(forward(model, batch))


def outputs_after(
    model: nn.Module,
    selection: Selection,
    batch: Any,
    forward: Forward,
    dense_features: Mapping[str, tuple[str, ...]],
) -> list[Tensor]:
    """What the pruned model computes in evaluation for an input of the old one.

    Args:
        model: the pruned model, sharded.
        selection: what was pruned.
        batch: an input of the old model; the pruned one gets its remaining dense columns.
        forward: runs a model on the batch.
        dense_features: fqn of a module that reads gated dense columns -> the columns' names.

    Returns:
        Every floating point tensor of the output.
    """
    with (
        _undisturbed(model),
        _narrowed_input(model, selection, dense_features),
    ):
        outputs = _floats(forward(model, batch))
    forget_input_order(model)
    return outputs


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


def forget_input_order(model: nn.Module) -> None:
    """Lets the next batch decide anew in which order the collections find their features.

    A sharded collection keeps the order of the first batch's keys for good, so a batch that has
    the dropped features too, as parity's has, would misplace those of a batch that has not. The
    same attributes that TorchRec resets in `ShardedEmbeddingBagCollection.update_shards`.
    """
    for collection in sharded_collections(model).values():
        collection._has_uninitialized_input_dist = True
        collection._input_dists = []
        collection._features_order = []
        collection._feature_splits = []
        if isinstance(collection, ShardedEmbeddingBagCollection):
            collection._has_features_permute = True


def _floats(output: Any) -> list[Tensor]:
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.is_floating_point()]


@contextmanager
def _scaled(model: nn.Module, selection: Selection) -> Iterator[None]:
    """Embeddings of features without a gate are multiplied by the selection's value."""
    gated = {feature for _, gates in feature_gates(model) for feature in gates.features}

    def scale(
        collection: ShardedCollection, _: tuple[Any, ...], embeddings: LazyAwaitable[Any]
    ) -> None:
        features = feature_names(tables_of(collection))
        values = [1.0 if f in gated else selection.gates.get(f, 1.0) for f in features]
        pooled = isinstance(collection, ShardedEmbeddingBagCollection)
        embeddings.callbacks.append(
            partial(
                scale_keys if pooled else scale_sequences,
                features=features,
                gates=torch.tensor(values, device=collection._device),
                centered=False,
            )
        )

    with ExitStack() as stack:
        for collection in sharded_collections(model).values():
            stack.callback(collection.register_forward_hook(scale).remove)
        yield


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
